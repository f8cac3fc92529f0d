"""Every number option of every command at 0, 1, -1 and its largest value: accepted, or rejected in one line.

``python -m tests.reliability.limits.sweep`` prints the results, ``make figures TOPIC=reliability PARTS=options``
records them. A command that still runs after some seconds counts as accepted: a training of 2^63 epochs has no end.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from experiments.command import check_minimums, run_command
from experiments.figures import Figure, Row, print_figures
from tests.reliability.case_process import Worker
from tests.reliability.commands import BY_OUTPUT, run_in, write_inputs
from tests.reliability.limits.options import LimitCase, cases
from tests.reliability.progress import Progress
from vpr.common.log import get_logger

log = get_logger(__name__)

MAX_SECONDS = 20.0  # processor time of a case
_FAULTS = ("crash", "exception")


@dataclass(frozen=True)
class SweepConfig:
    """Choice of the cases.

    Attributes:
        command: Command whose options are swept; empty sweeps all.
        first: Number of the first case among the chosen ones.
    """

    command: str = ""
    first: int = 0

    def __post_init__(self) -> None:
        check_minimums(self, {"first": 0})


@dataclass(frozen=True)
class SweepResult:
    """Outcome of a case: ``accepted``, ``rejected``, ``hang`` (still running) or a fault, and its description."""

    case: LimitCase
    outcome: str
    line: str

    @property
    def is_faulty(self) -> bool:
        """Whether the command ended with a traceback, or its process died."""
        return self.outcome in _FAULTS


def sweep(config: SweepConfig, progress: Progress | None = None) -> list[SweepResult]:
    """Make the inputs of all commands, and run the cases one after another.

    Cases of ``progress``, which an interrupted sweep has finished, are not measured again.
    """
    chosen = [n for n, case in enumerate(cases()) if config.command in ("", case.command.verb)][config.first :]
    finished = progress or Progress(None)
    known = dict(finished.known)
    results = [SweepResult(cases()[n], *known[cases()[n].name]) for n in chosen if cases()[n].name in known]
    chosen = [n for n in chosen if cases()[n].name not in known]
    if not chosen:
        return results
    with tempfile.TemporaryDirectory(prefix="limits-") as name:
        folder = Path(name)
        write_inputs(folder)
        for output in BY_OUTPUT:
            if output != "demo":
                run_in(folder, output)
        command = [sys.executable, "-m", "tests.reliability.limits.worker", str(folder)]
        with Worker(command, folder / "worker.log", MAX_SECONDS) as worker:
            for number in chosen:
                answer = worker.run(number)
                result = SweepResult(cases()[number], answer["outcome"], answer["line"])
                results.append(result)
                finished.add(result.case.name, [result.outcome, result.line])
                if result.is_faulty:
                    log.warning(f"  {result.case.name}: {result.outcome}: {result.line}")
    return results


def summarise(results: list[SweepResult], command: str) -> tuple[list[Figure], list[Row]]:
    """Return the number of cases and of tracebacks, and a table of outcomes by command."""
    figures = [
        Figure("options at their limits: cases tried", float(len(results)), "cases", None, ">=", command),
        Figure(
            "options at their limits: tracebacks or crashes",
            float(sum(result.is_faulty for result in results)),
            "cases",
            0.0,
            "<=",
            command,
        ),
    ]
    rows: list[Row] = []
    for verb in dict.fromkeys(result.case.command.verb for result in results):
        own = [result for result in results if result.case.command.verb == verb]
        counts = Counter(result.outcome for result in own)
        rows.append(
            {
                "command": f"`vpr {verb}`",
                "cases": len(own),
                "rejected in one line": counts["rejected"],
                "accepted, or still running": counts["accepted"] + counts["hang"],
                "tracebacks or crashes": sum(result.is_faulty for result in own),
            }
        )
    return figures, rows


def main(config: SweepConfig) -> bool:
    """Print figures and table; return whether there are faults."""
    results = sweep(config)
    print_figures(*summarise(results, "python -m tests.reliability.limits.sweep"))
    return any(result.is_faulty for result in results)


if __name__ == "__main__":
    run_command("tests.reliability.limits.sweep", __doc__, SweepConfig, main)
