"""Hours of the same work in one process, and whether it holds more memory, files or threads at their end.

``python -m tests.reliability.soak.soak --hours 2`` writes ``samples.csv`` as it goes; ``make figures TOPIC=reliability PARTS=soak``
does the same where there is none yet, and records what it says. An interrupted soak can be read too.
"""

from __future__ import annotations

import csv
import gc
import io
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path

import numpy as np
import torch

from experiments.command import run_command
from experiments.figures import Figure, Row
from tests.reliability.footprint import heap_in_use, measure_footprint
from tests.reliability.soak.round import make, one_round
from tests.reliability.soak.running_clock import RunningClock
from tests.reliability.soak.trend import fit_trend
from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

SAMPLES = "samples.csv"
_MOST_NAMES = 1_500_000
_TABLE = 10 << 20  # bytes by which it grows to 2 ** 21 slots
_MIB = 2**20


@dataclass(frozen=True)
class SoakConfig:
    """How long, and where.

    Attributes:
        hours: that the process runs; those in which it is stopped do not count.
        output: folder of ``samples.csv`` and of what the rounds make.
        pause: seconds of rest after each second of processor time, for machines that others work on.
        warmup: share of the hours that is left out of the slope: allocators and caches fill.
    """

    hours: float = 2.0
    output: str = "runs/soak"
    pause: float = 0.0
    warmup: float = 0.2

    def __post_init__(self) -> None:
        for name, most in (("hours", 1000.0), ("pause", 100.0), ("warmup", 0.9)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"{name}: {getattr(self, name)}: give 0 to {most:g}")


@dataclass(frozen=True)
class Sample:
    """What is written after each round.

    Attributes:
        hours: that the process has run.
        wall_hours: by the clock, those in which it was stopped included.
        processor_hours: that it has computed.
        resident_mib: memory in RAM, after Python's collector has run.
        anonymous_mib: of this, what is not of mapped files.
        heap_mib: what glibc's heaps have lent out, whatever holes are between; CPython's small objects lie elsewhere.
        threads: of the process.
        files: that it has open.
        answers: of the round's search, a digest.
    """

    hours: float
    wall_hours: float
    processor_hours: float
    resident_mib: float
    anonymous_mib: float
    heap_mib: float
    threads: int
    files: int
    answers: str


def soak(config: SoakConfig) -> Path:
    """Do the rounds and write the samples; the path of their file.

    Raises:
        UserError: samples of an earlier soak are there.
    """
    path = Path(config.output) / SAMPLES
    if path.exists():
        raise UserError(f"{path}: is of an earlier soak: move it away, or name another --output")
    torch.set_num_threads(1)
    make_room_for_names()
    made = Path(config.output) / "made"
    make(made)
    return record_rounds(config, lambda: one_round(made, Path(config.output) / "round"))


def make_room_for_names() -> None:
    """Let CPython's table of interned strings grow now, to what hours of rounds do not fill.

    Its slots are used up by strings that are long gone too, some thousand a round; then it is built again, up to twice
    as large: in the middle of a soak it once took 7.3 MiB more.
    """
    names: list[str] = []
    before = heap_in_use()
    while len(names) < _MOST_NAMES:
        names += [sys.intern(f"{__name__} {number}") for number in range(len(names), len(names) + 1000)]
        now = heap_in_use()
        if now - before > _TABLE:  # just built: half of it is free
            return
        before = now


def record_rounds(config: SoakConfig, work: Callable[[], str]) -> Path:
    """Call ``work`` until the hours are over, a line of ``samples.csv`` after each call."""
    path = Path(config.output) / SAMPLES
    path.parent.mkdir(parents=True, exist_ok=True)
    begun, computed = time.monotonic(), time.process_time()
    with path.open("w", newline="", encoding="utf-8") as stream, RunningClock() as clock:
        writer = csv.DictWriter(stream, [field.name for field in fields(Sample)])
        writer.writeheader()
        for number in count(1):
            before = time.process_time()
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                answers = work()
            seconds = (clock.seconds, time.monotonic() - begun, time.process_time() - computed)
            sample = _take_sample(seconds, answers)
            writer.writerow(asdict(sample))
            stream.flush()
            if number % 20 == 1:
                log.info(f"  round {number}, {sample.hours:.2f} h: {sample.resident_mib:.1f} MiB")
            if sample.hours >= config.hours:
                return path
            time.sleep(config.pause * (time.process_time() - before))
    raise AssertionError("the rounds have no end of their own")


def _take_sample(seconds: tuple[float, float, float], answers: str) -> Sample:
    gc.collect()
    now = measure_footprint()
    hours = [round(one / 3600, 7) for one in seconds]
    mib = [round(size / _MIB, 3) for size in (now.resident, now.anonymous, heap_in_use())]
    return Sample(hours[0], hours[1], hours[2], mib[0], mib[1], mib[2], now.threads, now.files, answers)


def read_samples(path: Path) -> list[Sample]:
    """The samples of a soak, also of one that was interrupted: a line without its end is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kinds = {"threads": int, "files": int, "answers": str}
    return [
        Sample(**{name: kinds.get(name, float)(value) for name, value in row.items()})  # type: ignore[arg-type]
        for row in csv.DictReader(line for line in lines if line.endswith("\n"))
    ]


def summarise(samples: list[Sample], warmup: float, command: str) -> tuple[list[Figure], list[Row]]:
    """The slope with its interval, what became of files, threads and answers, and the memory in tenths of the time."""
    hours = samples[-1].hours
    kept = [sample for sample in samples if sample.hours > warmup * hours]
    times = np.array([sample.hours for sample in kept])

    def slope(name: str) -> Figure:
        trend = fit_trend(times, np.array([getattr(sample, f"{name}_mib") for sample in kept]))
        return Figure(f"soak: slope of {name} memory", trend.slope, "MiB/h", None, "<=", command, trend.interval)

    def away(slope: Figure) -> Figure:
        assert slope.interval is not None
        low, high = slope.interval
        return Figure(f"{slope.name}: from its interval to zero", max(0.0, low, -high), "MiB/h", 0, "<=", command)

    # Resident memory also falls and rises with the pages of mapped files, which are the kernel's to keep or drop;
    # anonymous memory is what the process alone can lose. Neither may move.
    resident, anonymous = slope("resident"), slope("anonymous")
    grown = {name: getattr(kept[-1], name) - getattr(kept[0], name) for name in ("files", "threads")}
    figures = [
        Figure("soak: time that it ran", hours, "h", 2, ">=", command),
        Figure("soak: rounds of training, embedding and search", len(samples), "", None, ">=", command),
        Figure("soak: processor time", samples[-1].processor_hours, "h", None, ">=", command),
        resident,
        away(resident),
        anonymous,
        away(anonymous),
        slope("heap"),
        *(Figure(f"soak: more {name} at the end", value, "", 0, "<=", command) for name, value in grown.items()),
        Figure(
            "soak: rounds that found something else than the first",
            sum(sample.answers != samples[0].answers for sample in samples),
            "",
            0,
            "<=",
            command,
        ),
    ]
    return figures, [_tenth(samples, number) for number in range(10)]


def _tenth(samples: list[Sample], number: int) -> Row:
    edges = [samples[-1].hours * edge / 10 for edge in (number, number + 1)]
    some = [sample for sample in samples if edges[0] < sample.hours <= edges[1]]
    seen = [sample.resident_mib for sample in some]
    return {
        "hours": f"{edges[0]:.1f} to {edges[1]:.1f}",
        "rounds": len(some),
        "MiB, least": f"{min(seen):.1f}" if seen else "",
        "median": f"{np.median(seen):.1f}" if seen else "",
        "most": f"{max(seen):.1f}" if seen else "",
        "on the heap, median": f"{np.median([sample.heap_mib for sample in some]):.1f}" if seen else "",
        "threads": max((sample.threads for sample in some), default=""),
        "files": max((sample.files for sample in some), default=""),
    }


def main() -> None:
    """The soak that the flags ask for."""
    run_command("soak", __doc__, SoakConfig, lambda config: log.info(f"{soak(config)}: done"))


if __name__ == "__main__":
    main()
