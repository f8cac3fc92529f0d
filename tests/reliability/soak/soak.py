"""Soak: hours of the same work in one process, with its memory, files and threads.

``python -m tests.reliability.soak.soak --hours 2`` adds to ``samples.csv`` after each round.
``make figures TOPIC=reliability PARTS=soak`` records the samples, and soaks first if there are none. The samples of an
interrupted soak are valid too.
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
from tests.reliability.soak.round import make_inputs, run_round
from tests.reliability.soak.running_clock import RunningClock
from tests.reliability.soak.trend import fit_trend
from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

SAMPLES = "samples.csv"
_MAX_NAMES = 1_500_000
_TABLE_GROWTH = 10 << 20  # bytes by which the table grows to 2 ** 21 slots
_MIB = 2**20


@dataclass(frozen=True)
class SoakConfig:
    """Duration and folder of a soak.

    Attributes:
        hours: Running time of the process; suspended time does not count.
        output: Folder of ``samples.csv`` and of the rounds' files.
        pause: Seconds of rest after each second of processor time, for shared machines.
        warmup: Share of the hours left out of the slope, while allocators and caches fill.
    """

    hours: float = 2.0
    output: str = "runs/soak"
    pause: float = 0.0
    warmup: float = 0.2

    def __post_init__(self) -> None:
        for name, maximum in (("hours", 1000.0), ("pause", 100.0), ("warmup", 0.9)):
            if not 0 <= getattr(self, name) <= maximum:
                raise UserError(f"{name}: expected 0 to {maximum:g}, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Sample:
    """Resources of the process after a round.

    Attributes:
        hours: Running time.
        wall_hours: Time by the clock, suspended time included.
        processor_hours: Processor time.
        resident_mib: Memory in RAM, after a garbage collection.
        anonymous_mib: Part of it that belongs to no mapped file.
        heap_mib: Memory allocated from the C library's heaps, without holes; CPython keeps small objects elsewhere.
        threads: Number of threads.
        files: Number of open files.
        answers: Digest of the round's search results.
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
    """Run the rounds, write the samples, and return the path of their file.

    Raises:
        UserError: The folder has samples of an earlier soak.
    """
    path = Path(config.output) / SAMPLES
    if path.exists():
        raise UserError(f"{path}: it belongs to an earlier soak. Move it, or choose another --output.")
    torch.set_num_threads(1)
    grow_intern_table()
    inputs = Path(config.output) / "inputs"
    make_inputs(inputs)
    return record_rounds(config, lambda: run_round(inputs, Path(config.output) / "round"))


def grow_intern_table() -> None:
    """Grow CPython's table of interned strings to a size that hours of rounds do not fill.

    Deleted strings use up slots too, about a thousand in each round. CPython then rebuilds the table with up to twice
    the size, which once took 7.3 MiB in the middle of a soak.
    """
    names: list[str] = []
    before = heap_in_use()
    while len(names) < _MAX_NAMES:
        names += [sys.intern(f"{__name__} {number}") for number in range(len(names), len(names) + 1000)]
        now = heap_in_use()
        if now - before > _TABLE_GROWTH:  # newly built: half of it is free
            return
        before = now


def record_rounds(config: SoakConfig, work: Callable[[], str]) -> Path:
    """Call ``work`` until the hours are over, and add a line to ``samples.csv`` after each call."""
    path = Path(config.output) / SAMPLES
    path.parent.mkdir(parents=True, exist_ok=True)
    clock_start, processor_start = time.monotonic(), time.process_time()
    with path.open("w", newline="", encoding="utf-8") as stream, RunningClock() as clock:
        writer = csv.DictWriter(stream, [field.name for field in fields(Sample)])
        writer.writeheader()
        for number in count(1):
            before = time.process_time()
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                answers = work()
            seconds = (clock.seconds, time.monotonic() - clock_start, time.process_time() - processor_start)
            sample = _take_sample(seconds, answers)
            writer.writerow(asdict(sample))
            stream.flush()
            if number % 20 == 1:
                log.info(f"  round {number}, {sample.hours:.2f} h: {sample.resident_mib:.1f} MiB")
            if sample.hours >= config.hours:
                return path
            time.sleep(config.pause * (time.process_time() - before))
    raise AssertionError("unreachable: count() has no end")


def _take_sample(seconds: tuple[float, float, float], answers: str) -> Sample:
    gc.collect()
    now = measure_footprint()
    hours = [round(value / 3600, 7) for value in seconds]
    mib = [round(size / _MIB, 3) for size in (now.resident, now.anonymous, heap_in_use())]
    return Sample(hours[0], hours[1], hours[2], mib[0], mib[1], mib[2], now.threads, now.files, answers)


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a soak; an incomplete last line of an interrupted soak is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    types = {"threads": int, "files": int, "answers": str}
    return [
        Sample(**{name: types.get(name, float)(value) for name, value in row.items()})  # type: ignore[arg-type]
        for row in csv.DictReader(line for line in lines if line.endswith("\n"))
    ]


def summarise(samples: list[Sample], warmup: float, command: str) -> tuple[list[Figure], list[Row]]:
    """Return slopes of memory, changes of files, threads and answers, and a table by tenths of the time."""
    hours = samples[-1].hours
    measured = [sample for sample in samples if sample.hours > warmup * hours]
    times = np.array([sample.hours for sample in measured])

    def slope(name: str) -> Figure:
        trend = fit_trend(times, np.array([getattr(sample, f"{name}_mib") for sample in measured]))
        return Figure(f"soak: slope of {name} memory", trend.slope, "MiB/h", None, "<=", command, trend.interval)

    def distance_to_zero(slope: Figure) -> Figure:
        assert slope.interval is not None
        low, high = slope.interval
        return Figure(f"{slope.name}: from its interval to zero", max(0.0, low, -high), "MiB/h", 0, "<=", command)

    # Resident memory also changes with the pages of mapped files, which the kernel keeps or drops. A leak
    # of the process shows in anonymous memory. Neither may have a slope.
    resident, anonymous = slope("resident"), slope("anonymous")
    growth = {name: getattr(measured[-1], name) - getattr(measured[0], name) for name in ("files", "threads")}
    figures = [
        Figure("soak: running time", hours, "h", 2, ">=", command),
        Figure("soak: rounds of training, embedding and search", len(samples), "", None, ">=", command),
        Figure("soak: processor time", samples[-1].processor_hours, "h", None, ">=", command),
        resident,
        distance_to_zero(resident),
        anonymous,
        distance_to_zero(anonymous),
        slope("heap"),
        *(Figure(f"soak: more {name} at the end", value, "", 0, "<=", command) for name, value in growth.items()),
        Figure(
            "soak: rounds with other results than the first",
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
    part = [sample for sample in samples if edges[0] < sample.hours <= edges[1]]
    resident = [sample.resident_mib for sample in part]
    return {
        "hours": f"{edges[0]:.1f} to {edges[1]:.1f}",
        "rounds": len(part),
        "MiB, min": f"{min(resident):.1f}" if part else "",
        "median": f"{np.median(resident):.1f}" if part else "",
        "max": f"{max(resident):.1f}" if part else "",
        "on the heap, median": f"{np.median([sample.heap_mib for sample in part]):.1f}" if part else "",
        "threads": max((sample.threads for sample in part), default=""),
        "files": max((sample.files for sample in part), default=""),
    }


def main() -> None:
    """Run a soak."""
    run_command("tests.reliability.soak.soak", __doc__, SoakConfig, lambda config: log.info(f"{soak(config)}: done"))


if __name__ == "__main__":
    main()
