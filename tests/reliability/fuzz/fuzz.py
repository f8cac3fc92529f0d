"""Fuzz the commands with mutated files: each must be rejected in one line, or do no harm.

``python -m tests.reliability.fuzz.fuzz --count 2000`` prints the results;
``make figures TOPIC=reliability PARTS=mutations`` records them.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.command import check_minimums, run_command
from experiments.figures import Figure, Row, print_figures
from tests.reliability.case_process import Worker
from vpr.common.log import get_logger

log = get_logger(__name__)

MAX_SECONDS = 5.0  # processor time of a case; other work on the machine does not lengthen it
_FAULTS = ("crash", "hang", "exception", "half-written")


@dataclass(frozen=True)
class FuzzConfig:
    """Choice of the cases.

    Attributes:
        count: Number of mutated files.
        seed: Seed of all mutations.
        first: Number of the first case; ``--count 1`` repeats a single case.
    """

    count: int = 2000
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check_minimums(self, {"count": 1, "seed": 0, "first": 0})


@dataclass(frozen=True)
class FuzzResult:
    """Outcome of one mutated file.

    Attributes:
        case: Number of the case.
        artifact: Artifact of the file.
        file: Name of the mutated file.
        verb: Case that read the artifact.
        mutation: Mutation in words.
        signed: Whether the checksums fit the mutated file.
        outcome: ``rejected`` in one line, ``accepted``, or one of the faults ``crash``, ``hang``, ``exception`` (any
            but a one-line error message) and ``half-written``.
        line: Error message, or a description of the fault.
        seconds: Processor time, mutation included.
        memory: Largest resident size of the process, in bytes.
    """

    case: int
    artifact: str
    file: str
    verb: str
    mutation: str
    signed: bool
    outcome: str
    line: str
    seconds: float
    memory: int

    @property
    def is_faulty(self) -> bool:
        """Whether the outcome is a fault."""
        return self.outcome in _FAULTS


def fuzz(config: FuzzConfig) -> list[FuzzResult]:
    """Run the cases one after another; the same seed and numbers give the same mutations."""
    from tests.reliability.cases import make_artifacts
    from tests.reliability.fuzz.worker import route_of

    results = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        make_artifacts(folder / "originals")
        command = [sys.executable, "-m", "tests.reliability.fuzz.worker"]
        command += [str(folder / "originals"), str(folder / "case"), str(config.seed)]
        with Worker(command, folder / "worker.log", MAX_SECONDS) as worker:
            for case in range(config.first, config.first + config.count):
                answer = {"mutation": "", "signed": True, "seconds": MAX_SECONDS, "memory": 0, **worker.run(case)}
                result = FuzzResult(case, **vars(route_of(case)), **answer)
                results.append(result)
                if result.is_faulty:
                    log.warning(
                        f"  case {case}: {result.verb} on {result.artifact}/{result.file}: {result.outcome}: "
                        f"{result.line}\n    after: {result.mutation}"
                    )
    return results


def summarise(results: list[FuzzResult], command: str, seed: int = 0) -> tuple[list[Figure], list[Row]]:
    """Return figures of faults, and a table of outcomes by file and case."""
    outcomes = Counter(result.outcome for result in results)
    seeds = (seed,)

    def figure(name: str, value: float, goal: float | None, unit: str = "files") -> Figure:
        return Figure(f"fuzz: {name}", value, unit, goal, "<=", command, seeds=seeds)

    figures = [
        Figure("fuzz: mutated files tried", len(results), "files", 2000, ">=", command, seeds=seeds),
        figure("crashes", outcomes["crash"], 0),
        figure(f"hangs over {MAX_SECONDS:g} s", outcomes["hang"], 0),
        figure("exceptions other than an error line", outcomes["exception"], 0),
        figure("files left half-written, older results changed", outcomes["half-written"], 0),
        figure("rejected with an error line", outcomes["rejected"], None),
        figure("accepted, since they are still valid", outcomes["accepted"], None),
        figure("slowest", max(result.seconds for result in results), None, "s"),
        figure("largest process", max(result.memory for result in results) / 2**30, None, "GiB"),
    ]
    rows = []
    for route in dict.fromkeys((result.artifact, result.file, result.verb) for result in results):
        of_route = [result for result in results if (result.artifact, result.file, result.verb) == route]
        counts = Counter(result.outcome for result in of_route)
        rows.append(
            {
                "file": f"{route[0]}: {route[1]}",
                "read by": route[2],
                "tried": len(of_route),
                "checksums updated": sum(result.signed for result in of_route),
                "rejected": counts["rejected"],
                "accepted": counts["accepted"],
                "faults": sum(counts[fault] for fault in _FAULTS),
            }
        )
    return figures, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases and print the table; exit code 1 on a fault."""

    def work(config: FuzzConfig) -> bool:
        results = fuzz(config)
        print_figures(*summarise(results, "python -m tests.reliability.fuzz.fuzz", config.seed))
        return any(result.is_faulty for result in results)

    run_command("tests.reliability.fuzz.fuzz", __doc__, FuzzConfig, work, arguments)


if __name__ == "__main__":
    main()
