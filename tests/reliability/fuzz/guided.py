"""A coverage-guided fuzzer over what parses: ``python -m tests.reliability.fuzz.guided --seconds 60 --targets card``.

It needs ``make fuzzer``. The inputs that covered more than others, and the faults, stay in ``runs/fuzz``, where the
next run goes on. A fault is mended in the product, and its input moves to ``tests/reliability/fuzz/corpus``, which begins every run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.command import run_command
from experiments.figures import ROOT, Figure, Row, show
from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

NAMES = ("card", "table", "ranges", "graph")
KEPT = ROOT / "tests" / "reliability" / "fuzz" / "corpus"
_COVERED = re.compile(r"cov: (\d+) ft: \d+")
_OPTIONS = ("-rss_limit_mb=4096", "-timeout=10", "-print_final_stats=1", "-reload=0")
_FAULTS = ("fault-", "crash-", "timeout-", "oom-", "leak-")
_MEMORY = "/dev/shm"  # waits for a disk take most of the time of inputs that are this small
_RESTARTS = 100  # after crashes, or where the machine stood still


@dataclass(frozen=True)
class GuidedFuzzConfig:
    """Which targets are fuzzed, and for how long.

    Attributes:
        targets: of :data:`tests.reliability.fuzz.targets.TARGETS`.
        seconds: of processor time for each, all runs of the output together.
        output: folder of what is found.
    """

    targets: tuple[str, ...] = NAMES
    seconds: float = 1800.0
    output: str = "runs/fuzz"

    def __post_init__(self) -> None:
        if unknown := set(self.targets) - set(NAMES):
            raise UserError(f"targets: no target '{min(unknown)}': choose from {', '.join(NAMES)}")
        if not self.seconds > 0:
            raise UserError(f"seconds: {self.seconds}: give more than 0")


@dataclass(frozen=True)
class Fuzzed:
    """What became of a target.

    Attributes:
        target: its name.
        seconds: of processor time.
        accepted: inputs that were well-formed.
        refused: inputs that were refused by a line.
        faults: names of the inputs that did anything else, in the target's folder.
        covered: branches of our code that an empty input, the kept corpus and all inputs together reach.
    """

    target: str
    seconds: float
    accepted: int
    refused: int
    faults: tuple[str, ...]
    covered: tuple[int, int, int]


def guided_fuzz(config: GuidedFuzzConfig) -> Iterator[Fuzzed]:
    """Fuzz one target after another.

    Raises:
        UserError: atheris is not installed, or its process does not start.
    """
    if importlib.util.find_spec("atheris") is None:
        raise UserError("atheris: not installed: make fuzzer")
    for target in config.targets:
        yield _fuzz(target, Path(config.output).resolve() / target, config.seconds)


def _fuzz(target: str, folder: Path, seconds: float) -> Fuzzed:
    grown = folder / "corpus"
    grown.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        empty = Path(name) / "empty"
        empty.mkdir()
        nothing = _covered(_run(target, Path(name), seconds, str(empty), "-runs=0"))
        kept = _covered(_run(target, Path(name), seconds, str(empty), str(KEPT / target), "-runs=0"))
    for _ in range(_RESTARTS):
        if _told(folder)["seconds"] >= seconds:
            break
        _run(target, folder, seconds, str(grown), str(KEPT / target))
        _drop_false_alarms(target, folder)
    told = _told(folder)
    with tempfile.TemporaryDirectory() as name:
        reached = _covered(_run(target, Path(name), math.inf, str(grown), str(KEPT / target), "-runs=0"))
    faults = sorted(path.name for path in folder.iterdir() if path.name.startswith(_FAULTS) and path.suffix != ".txt")
    fuzzed = Fuzzed(target, told["seconds"], told["accepted"], told["refused"], tuple(faults), (nothing, kept, reached))
    log.info(
        f"  {target}: {told['accepted'] + told['refused']} inputs in {told['seconds']:.0f} s, {len(faults)} faults"
    )
    return fuzzed


def _told(folder: Path) -> dict[str, Any]:
    """What all runs so far have counted."""
    path = folder / "told.json"
    none = {"accepted": 0, "refused": 0, "seconds": 0.0}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else none


def _drop_false_alarms(target: str, folder: Path) -> None:
    """A hang must come again: libFuzzer's timeouts are by the clock, which runs on while a process is stopped."""
    for path in folder.glob("timeout-*"):
        with tempfile.TemporaryDirectory() as name:
            if _work(target, Path(name), math.inf, str(path)) == 0:
                path.unlink()


def _work(target: str, folder: Path, seconds: float, *arguments: str) -> int:
    """Run the worker to its end; its exit status. What it wrote is in ``log.txt``."""
    command = [sys.executable, "-m", "tests.reliability.fuzz.guided_worker", target, str(folder), str(seconds)]
    command += [*arguments, *_OPTIONS, f"-artifact_prefix={folder}/"]
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as place, (folder / "log.txt").open("w") as log:
        environment = {**os.environ, "TMPDIR": place}
        return subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False).returncode


def _run(target: str, folder: Path, seconds: float, *arguments: str) -> str:
    """Fuzz, or look at inputs; what the worker wrote."""
    _work(target, folder, seconds, *arguments)
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    if not _COVERED.search(text):
        raise UserError(f"{target}: its fuzzer does not start: {' '.join(text[-300:].split())}: mend that first")
    return text


def _covered(log: str) -> int:
    return int(_COVERED.findall(log)[-1])


def summarise(found: list[Fuzzed], command: str) -> tuple[list[Figure], list[Row]]:
    """Figures of each target, and a table of all."""
    figures, rows = [], []
    for one in found:
        name = f"guided fuzz of {one.target}"
        figures += [
            Figure(f"{name}: processor time", one.seconds / 60, "min", 30, ">=", command),
            Figure(f"{name}: neither accepted nor refused by a line", len(one.faults), "inputs", 0, "<=", command),
        ]
        nothing, kept, all_inputs = one.covered
        rows.append(
            {
                "target": one.target,
                "processor minutes": f"{one.seconds / 60:.1f}",
                "accepted": one.accepted,
                "refused": one.refused,
                "branches: empty input": nothing,
                "kept corpus": kept,
                "all inputs": all_inputs,
                "faults": len(one.faults),
            }
        )
    return figures, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Fuzz what the flags ask for and print the table; ends with 1 where there is a fault."""

    def work(config: GuidedFuzzConfig) -> bool:
        found = list(guided_fuzz(config))
        show(*summarise(found, "python -m tests.reliability.fuzz.guided"))
        return any(one.faults for one in found)

    run_command("tests.reliability.fuzz.guided", __doc__, GuidedFuzzConfig, work, arguments)


if __name__ == "__main__":
    main()
