"""Fuzz the parsers guided by coverage: ``python -m tests.reliability.fuzz.guided --seconds 60 --targets card``.

This needs ``make fuzzer``. Inputs with new coverage, and faults, stay in ``runs/fuzz``, where the next run resumes.
Fix a fault in the product, and move its input to ``tests/reliability/fuzz/corpus``, with which every run starts.
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
from experiments.figures import ROOT, Figure, Row, print_figures
from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

NAMES = ("card", "table", "ranges", "graph")
CORPUS = ROOT / "tests" / "reliability" / "fuzz" / "corpus"
_COVERAGE = re.compile(r"cov: (\d+) ft: \d+")
_OPTIONS = ("-rss_limit_mb=4096", "-timeout=10", "-print_final_stats=1", "-reload=0")
_FAULTS = ("fault-", "crash-", "timeout-", "oom-", "leak-")
_MEMORY = "/dev/shm"  # inputs are so small that waiting for a disk would take most of the time
_MAX_RESTARTS = 100  # after crashes, or after the machine was suspended


@dataclass(frozen=True)
class GuidedFuzzConfig:
    """Choice of the targets and their time.

    Attributes:
        targets: Names in :data:`tests.reliability.fuzz.targets.TARGETS`.
        seconds: Processor time of each target, over all runs with the same output.
        output: Folder of the inputs and faults.
    """

    targets: tuple[str, ...] = NAMES
    seconds: float = 1800.0
    output: str = "runs/fuzz"

    def __post_init__(self) -> None:
        if unknown := set(self.targets) - set(NAMES):
            raise UserError(f"targets: no target '{min(unknown)}'. Choose from {', '.join(NAMES)}.")
        if not self.seconds > 0:
            raise UserError(f"seconds: expected more than 0, got {self.seconds}.")


@dataclass(frozen=True)
class TargetResult:
    """Result of a target.

    Attributes:
        target: Name of the target.
        seconds: Processor time.
        accepted: Number of well-formed inputs.
        rejected: Number of inputs rejected in one line.
        faults: File names of all other inputs, in the target's folder.
        coverage: Numbers of covered branches of the project: by an empty input, by the stored corpus, by all inputs.
    """

    target: str
    seconds: float
    accepted: int
    rejected: int
    faults: tuple[str, ...]
    coverage: tuple[int, int, int]


def guided_fuzz(config: GuidedFuzzConfig) -> Iterator[TargetResult]:
    """Fuzz one target after another.

    Raises:
        UserError: atheris is not installed, or its process does not start.
    """
    if importlib.util.find_spec("atheris") is None:
        raise UserError("atheris: it is not installed. Run `make fuzzer`.")
    for target in config.targets:
        yield _fuzz_target(target, Path(config.output).resolve() / target, config.seconds)


def _fuzz_target(target: str, folder: Path, seconds: float) -> TargetResult:
    grown = folder / "corpus"
    grown.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        empty = Path(name) / "empty"
        empty.mkdir()
        of_empty = _coverage(_run(target, Path(name), seconds, str(empty), "-runs=0"))
        of_corpus = _coverage(_run(target, Path(name), seconds, str(empty), str(CORPUS / target), "-runs=0"))
    for _ in range(_MAX_RESTARTS):
        if _read_counts(folder)["seconds"] >= seconds:
            break
        _run(target, folder, seconds, str(grown), str(CORPUS / target))
        _drop_false_alarms(target, folder)
    counts = _read_counts(folder)
    with tempfile.TemporaryDirectory() as name:
        of_all = _coverage(_run(target, Path(name), math.inf, str(grown), str(CORPUS / target), "-runs=0"))
    faults = sorted(path.name for path in folder.iterdir() if path.name.startswith(_FAULTS) and path.suffix != ".txt")
    accepted, rejected, spent = counts["accepted"], counts["rejected"], counts["seconds"]
    log.info(f"  {target}: {accepted + rejected} inputs in {spent:.0f} s, {len(faults)} faults")
    return TargetResult(target, spent, accepted, rejected, tuple(faults), (of_empty, of_corpus, of_all))


def _read_counts(folder: Path) -> dict[str, Any]:
    """Return the counts of all runs so far."""
    path = folder / "counts.json"
    zeros = {"accepted": 0, "rejected": 0, "seconds": 0.0}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else zeros


def _drop_false_alarms(target: str, folder: Path) -> None:
    """Delete hangs that do not repeat: libFuzzer's clock also runs while a process is suspended."""
    for path in folder.glob("timeout-*"):
        with tempfile.TemporaryDirectory() as name:
            if _run_worker(target, Path(name), math.inf, str(path)) == 0:
                path.unlink()


def _run_worker(target: str, folder: Path, seconds: float, *arguments: str) -> int:
    """Run the worker to its end and return its exit status; its output is in ``log.txt``."""
    command = [sys.executable, "-m", "tests.reliability.fuzz.guided_worker", target, str(folder), str(seconds)]
    command += [*arguments, *_OPTIONS, f"-artifact_prefix={folder}/"]
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as temporary, (folder / "log.txt").open("w") as log:
        environment = {**os.environ, "TMPDIR": temporary}
        return subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False).returncode


def _run(target: str, folder: Path, seconds: float, *arguments: str) -> str:
    """Fuzz, or only read inputs, and return the output of the worker."""
    _run_worker(target, folder, seconds, *arguments)
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    if not _COVERAGE.search(text):
        raise UserError(
            f"{target}: the fuzzer does not start ({' '.join(text[-300:].split())}). Fix this error and rerun."
        )
    return text


def _coverage(log: str) -> int:
    return int(_COVERAGE.findall(log)[-1])


def summarise(results: list[TargetResult], command: str) -> tuple[list[Figure], list[Row]]:
    """Return figures of each target, and a table of all."""
    figures, rows = [], []
    for result in results:
        name = f"guided fuzz of {result.target}"
        figures += [
            Figure(f"{name}: processor time", result.seconds / 60, "min", 30, ">=", command),
            Figure(
                f"{name}: neither accepted nor rejected in one line", len(result.faults), "inputs", 0, "<=", command
            ),
        ]
        of_empty, of_corpus, of_all = result.coverage
        rows.append(
            {
                "target": result.target,
                "processor minutes": f"{result.seconds / 60:.1f}",
                "accepted": result.accepted,
                "rejected": result.rejected,
                "branches: empty input": of_empty,
                "stored corpus": of_corpus,
                "all inputs": of_all,
                "faults": len(result.faults),
            }
        )
    return figures, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Fuzz the targets and print the table; exit code 1 on a fault."""

    def work(config: GuidedFuzzConfig) -> bool:
        results = list(guided_fuzz(config))
        print_figures(*summarise(results, "python -m tests.reliability.fuzz.guided"))
        return any(result.faults for result in results)

    run_command("tests.reliability.fuzz.guided", __doc__, GuidedFuzzConfig, work, arguments)


if __name__ == "__main__":
    main()
