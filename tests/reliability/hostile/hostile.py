"""Input that attacks, given to everything that reads it: each must be refused by a line, set aside, or read rightly.

``python -m tests.reliability.hostile.hostile`` prints what was found; ``make figures TOPIC=reliability PARTS=hostile`` records it.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.command import run_command
from experiments.figures import Figure, Row, show
from tests.reliability.case_process import Worker
from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

LONGEST = 10.0  # seconds of processor time, of a verb
_WITH_ITS_FILE = 25.0  # the same, with the making of what it is given
MOST_MEMORY = 2.0  # GB of a process, its libraries included
_FAULTS = ("crash", "hang", "exception", "half-written", "outside")
_GOOD = {"taken": {"accepted"}, "refused": {"refused", "set aside"}, "set aside": {"set aside"}}


@dataclass(frozen=True)
class HostileConfig:
    """Which cases are run.

    Attributes:
        every: of the cases, which number lies this far apart; 1 runs all.
        first: number of the first case.
        count: most cases; 0 takes all that are left.
    """

    every: int = 1
    first: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        for name, least in {"every": 1, "first": 0, "count": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)}: give {least} or more")


@dataclass(frozen=True)
class HostileResult:
    """What became of one input on one road.

    Attributes:
        case: its number.
        kind: of the attack.
        name: what it does.
        road: that it took.
        expected: ``taken``, ``refused`` or ``set aside``.
        outcome: ``refused`` by a line, ``set aside`` with a reason, ``accepted``, or one of the faults ``crash``,
            ``hang``, ``exception`` (other than an error line), ``half-written`` and ``outside`` (written around the
            artifact).
        line: the refusal or the reason, or what is known of the fault.
        seconds: of processor time that the verb took.
        clock: the same by the clock.
        memory: largest resident size of the process meanwhile, bytes.
    """

    case: int
    kind: str
    name: str
    road: str
    expected: str
    outcome: str
    line: str
    seconds: float
    clock: float
    memory: int

    @property
    def faulty(self) -> bool:
        """Whether this is what must not be."""
        if self.outcome in _FAULTS or self.seconds > LONGEST or self.memory > MOST_MEMORY * 1e9:
            return True
        return self.outcome not in _GOOD[self.expected]


def attack(config: HostileConfig) -> list[HostileResult]:
    """Run the cases one after another, in a process of their own that is replaced when it dies.

    Raises:
        UserError: there are none behind the first.
    """
    from tests.reliability.hostile.worker import cases

    numbers = range(config.first, len(cases()), config.every)
    if not numbers:
        raise UserError(f"first: {config.first}: there are {len(cases())} cases: give a smaller number")
    found = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        place = Path(name) / "place"
        command = [sys.executable, "-m", "tests.reliability.hostile.worker", str(place)]
        with Worker(command, Path(name) / "worker.log", _WITH_ITS_FILE) as worker:
            for number in numbers[: config.count or None]:
                case = cases()[number]
                told = {"seconds": _WITH_ITS_FILE, "clock": _WITH_ITS_FILE, "memory": 0, **worker.ask(number)}
                one = HostileResult(number, case.kind, case.name, case.road, case.expected, **told)
                found.append(one)
                if one.faulty:
                    log.info(f"  case {number}: {one.kind}: {one.name}: {one.road}: {one.outcome}: {one.line}")
                    log.info(f"    {one.seconds} s, {one.memory / 1e9:.2f} GB, {one.expected} was expected")
    return found


def summarise(found: list[HostileResult], command: str) -> tuple[list[Figure], list[Row]]:
    """Figures of what must not be, and a table of outcomes by kind of attack."""
    seen = Counter(one.outcome for one in found)

    def figure(name: str, value: float, goal: float | None, unit: str = "runs") -> Figure:
        return Figure(f"hostile: {name}", value, unit, goal, "<=", command)

    files = len({(one.kind, one.name) for one in found})
    surprising = sum(one.outcome not in (*_GOOD[one.expected], *_FAULTS) for one in found)
    figures = [
        Figure("hostile: distinct inputs", files, "inputs", 300, ">=", command),
        figure("runs, each input on each of its roads", len(found), None),
        figure("crashes", seen["crash"], 0),
        figure(f"hangs over {LONGEST:g} s", sum(one.outcome == "hang" or one.seconds > LONGEST for one in found), 0),
        figure("slowest, processor time", max(one.seconds for one in found), LONGEST, "s"),
        figure("slowest, by the clock", max(one.clock for one in found), None, "s"),
        figure("largest process", max(one.memory for one in found) / 1e9, MOST_MEMORY, "GB"),
        figure("writes outside the artifact", seen["outside"], 0),
        figure("exceptions other than an error line", seen["exception"], 0),
        figure("files left half-written, older results changed", seen["half-written"], 0),
        figure("refused where it is a good image, or taken where it is none", surprising, 0),
    ]
    rows = []
    for kind in dict.fromkeys(one.kind for one in found):
        some = [one for one in found if one.kind == kind]
        counts = Counter(one.outcome for one in some)
        rows.append(
            {
                "attack": kind,
                "inputs": len({one.name for one in some}),
                "roads": ", ".join(dict.fromkeys(one.road for one in some)),
                "refused by a line": counts["refused"],
                "set aside": counts["set aside"],
                "read": counts["accepted"],
                "faults": sum(one.faulty for one in some),
                "slowest, s": max(one.seconds for one in some),
                "largest, GB": round(max(one.memory for one in some) / 1e9, 2),
            }
        )
    return figures, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases that the flags ask for and print the table; ends with 1 where there is a fault."""

    def work(config: HostileConfig) -> bool:
        found = attack(config)
        show(*summarise(found, "python -m tests.reliability.hostile.hostile"))
        return any(one.faulty for one in found)

    run_command("tests.reliability.hostile.hostile", __doc__, HostileConfig, work, arguments)


if __name__ == "__main__":
    main()
