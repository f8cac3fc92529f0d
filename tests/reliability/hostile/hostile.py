"""Give hostile input to every route that reads it: each must reject it in one line, set it aside, or read it correctly.

``python -m tests.reliability.hostile.hostile`` prints the results;
``make figures TOPIC=reliability PARTS=hostile`` records them.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.command import check_minimums, run_command
from experiments.figures import Figure, Row, print_figures
from tests.reliability.case_process import Worker
from tests.reliability.progress import Progress
from vpr.common.errors import UserError
from vpr.common.log import get_logger

if TYPE_CHECKING:
    from tests.reliability.hostile.worker import Case

log = get_logger(__name__)

MAX_SECONDS = 10.0  # processor time of a route
_MAX_SECONDS_WITH_INPUT = 60.0  # the same, the time to create the input, and to load a route's libraries first
MAX_MEMORY = 2.0  # GB of a process, its libraries included
_FAULTS = ("crash", "hang", "exception", "half-written", "outside")
_VALID = {"accepted": {"accepted"}, "rejected": {"rejected", "set aside"}, "set aside": {"set aside"}}


@dataclass(frozen=True)
class HostileConfig:
    """Choice of the cases.

    Attributes:
        every: Step between the numbers of the cases; 1 runs all.
        first: Number of the first case.
        count: Maximum number of cases; 0 runs all that remain.
    """

    every: int = 1
    first: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        check_minimums(self, {"every": 1, "first": 0, "count": 0})


@dataclass(frozen=True)
class HostileResult:
    """Outcome of one input on one route.

    Attributes:
        case: Number of the case.
        kind: Kind of the attack.
        name: Name of the attack.
        route: Route that read the input.
        expected: ``accepted``, ``rejected`` or ``set aside``.
        outcome: ``rejected`` in one line, ``set aside`` with a reason, ``accepted``, or one of the faults ``crash``,
            ``hang``, ``exception`` (any but a one-line error message), ``half-written`` and ``outside`` (files written
            outside of the artifact).
        line: Error message or reason, or a description of the fault.
        seconds: Processor time of the route.
        clock: Time of the route by the clock, in seconds.
        memory: Largest resident size of the process, in bytes.
    """

    case: int
    kind: str
    name: str
    route: str
    expected: str
    outcome: str
    line: str
    seconds: float
    clock: float
    memory: int

    @property
    def is_faulty(self) -> bool:
        """Whether the outcome is a fault, unexpected, too slow or too large."""
        if self.outcome in _FAULTS or self.seconds > MAX_SECONDS or self.memory > MAX_MEMORY * 1e9:
            return True
        return self.outcome not in _VALID[self.expected]


def attack(config: HostileConfig, progress: Progress | None = None) -> list[HostileResult]:
    """Run the cases one after another, in a worker process that restarts when it dies.

    Cases of ``progress``, which an interrupted measurement has finished, are not run again.

    Raises:
        UserError: ``first`` is larger than the number of cases.
    """
    from tests.reliability.hostile.worker import cases

    numbers = range(config.first, len(cases()), config.every)
    if not numbers:
        raise UserError(f"first: expected less than {len(cases())}, the number of cases, got {config.first}.")
    finished = progress or Progress(None)
    chosen = numbers[: config.count or None]
    left = [number for number in chosen if _key(cases()[number]) not in finished.known]
    if left:
        _run(left, finished)
    return [_result(number, cases()[number], finished) for number in chosen]


def _run(numbers: Sequence[int], finished: Progress) -> None:
    """Run cases and add their results."""
    from tests.reliability.hostile.worker import cases

    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name) / "worker"
        command = [sys.executable, "-m", "tests.reliability.hostile.worker", str(folder)]
        with Worker(command, Path(name) / "worker.log", _MAX_SECONDS_WITH_INPUT) as worker:
            for number in numbers:
                limits = {"seconds": _MAX_SECONDS_WITH_INPUT, "clock": _MAX_SECONDS_WITH_INPUT, "memory": 0}
                finished.add(_key(cases()[number]), {**limits, **worker.run(number)})
                _log_fault(_result(number, cases()[number], finished))


def _key(case: Case) -> str:
    return f"{case.kind}: {case.name}: {case.route}"


def _result(number: int, case: Case, finished: Progress) -> HostileResult:
    return HostileResult(number, case.kind, case.name, case.route, case.expected, **finished.known[_key(case)])


def _log_fault(result: HostileResult) -> None:
    if result.is_faulty:
        log.warning(
            f"  case {result.case}: {result.kind}: {result.name}: {result.route}: {result.outcome}: {result.line}\n"
            f"    {result.seconds} s, {result.memory / 1e9:.2f} GB, expected: {result.expected}"
        )


def summarise(results: list[HostileResult], command: str) -> tuple[list[Figure], list[Row]]:
    """Return figures of faults, and a table of outcomes by kind of attack."""
    outcomes = Counter(result.outcome for result in results)

    def figure(name: str, value: float, goal: float | None, unit: str = "runs") -> Figure:
        return Figure(f"hostile: {name}", value, unit, goal, "<=", command)

    inputs = len({(result.kind, result.name) for result in results})
    hangs = sum(result.outcome == "hang" or result.seconds > MAX_SECONDS for result in results)
    unexpected = sum(result.outcome not in (*_VALID[result.expected], *_FAULTS) for result in results)
    figures = [
        Figure("hostile: distinct inputs", inputs, "inputs", 600, ">=", command),
        figure("runs, each input on each of its routes", len(results), None),
        figure("crashes", outcomes["crash"], 0),
        figure(f"hangs over {MAX_SECONDS:g} s", hangs, 0),
        figure("slowest, processor time", max(result.seconds for result in results), MAX_SECONDS, "s"),
        figure("slowest, by the clock", max(result.clock for result in results), None, "s"),
        figure("largest process", max(result.memory for result in results) / 1e9, MAX_MEMORY, "GB"),
        figure("writes outside the artifact", outcomes["outside"], 0),
        figure("exceptions other than an error line", outcomes["exception"], 0),
        figure("files left half-written, older results changed", outcomes["half-written"], 0),
        figure("valid images rejected, invalid input accepted", unexpected, 0),
    ]
    rows = []
    for kind in dict.fromkeys(result.kind for result in results):
        of_kind = [result for result in results if result.kind == kind]
        counts = Counter(result.outcome for result in of_kind)
        rows.append(
            {
                "attack": kind,
                "inputs": len({result.name for result in of_kind}),
                "routes": ", ".join(dict.fromkeys(result.route for result in of_kind)),
                "rejected": counts["rejected"],
                "set aside": counts["set aside"],
                "accepted": counts["accepted"],
                "faults": sum(result.is_faulty for result in of_kind),
                "slowest, s": max(result.seconds for result in of_kind),
                "largest, GB": round(max(result.memory for result in of_kind) / 1e9, 2),
            }
        )
    return figures, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases and print the table; exit code 1 on a fault."""

    def work(config: HostileConfig) -> bool:
        results = attack(config)
        print_figures(*summarise(results, "python -m tests.reliability.hostile.hostile"))
        return any(result.is_faulty for result in results)

    run_command("tests.reliability.hostile.hostile", __doc__, HostileConfig, work, arguments)


if __name__ == "__main__":
    main()
