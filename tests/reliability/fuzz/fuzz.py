"""Files written wrong, given to the verbs that read them: each must be refused by a line, or do no harm.

``python -m tests.reliability.fuzz.fuzz --count 2000`` prints what was found; ``make figures TOPIC=int8 PARTS=fuzz`` records it.
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

LONGEST = 5.0  # seconds of processor time, which other work on the machine does not lengthen
_FAULTS = ("crash", "hang", "exception", "half-written")


@dataclass(frozen=True)
class FuzzConfig:
    """Which cases are run.

    Attributes:
        count: mutated files.
        seed: of all mutations.
        first: number of the first case; with ``--count 1`` a single one is run again.
    """

    count: int = 2000
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        for name, least in {"count": 1, "seed": 0, "first": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)}: give {least} or more")


@dataclass(frozen=True)
class FuzzResult:
    """What became of one mutated file.

    Attributes:
        case: its number.
        artifact: that the file belongs to.
        file: that was mutated.
        verb: that was given the artifact.
        mutation: in words.
        signed: whether the checksums were made to fit.
        outcome: ``refused`` by a line, ``accepted``, or one of the faults ``crash``, ``hang``, ``exception`` (other
            than an error line) and ``half-written``.
        line: the refusal, or what is known of the fault.
        seconds: of processor time that it took, mutation included.
        memory: largest resident size of the process meanwhile, bytes.
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
    def faulty(self) -> bool:
        """Whether this is what must not be."""
        return self.outcome in _FAULTS


def fuzz(config: FuzzConfig) -> list[FuzzResult]:
    """Run the cases one after another; the same seed and numbers give the same mutations."""
    from tests.reliability.commands import make_artifacts
    from tests.reliability.fuzz.worker import route_of

    found = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        make_artifacts(folder / "originals")
        command = [sys.executable, "-m", "tests.reliability.fuzz.worker"]
        command += [str(folder / "originals"), str(folder / "case"), str(config.seed)]
        with Worker(command, folder / "worker.log", LONGEST) as worker:
            for case in range(config.first, config.first + config.count):
                told = {"mutation": "", "signed": True, "seconds": LONGEST, "memory": 0, **worker.ask(case)}
                one = FuzzResult(case, **vars(route_of(case)), **told)
                found.append(one)
                if one.faulty:
                    log.info(f"  case {case}: {one.verb} on {one.artifact}/{one.file}: {one.outcome}: {one.line}")
                    log.info(f"    after: {one.mutation}")
    return found


def summarise(found: list[FuzzResult], command: str, seed: int = 0) -> tuple[list[Figure], list[Row]]:
    """Figures of what must not be, and a table of outcomes by file and verb."""
    seen = Counter(one.outcome for one in found)
    seeds = (seed,)

    def figure(name: str, value: float, goal: float | None, unit: str = "files") -> Figure:
        return Figure(f"fuzz: {name}", value, unit, goal, "<=", command, seeds=seeds)

    figures = [
        Figure("fuzz: mutated files tried", len(found), "files", 2000, ">=", command, seeds=seeds),
        figure("crashes", seen["crash"], 0),
        figure(f"hangs over {LONGEST:g} s", seen["hang"], 0),
        figure("exceptions other than an error line", seen["exception"], 0),
        figure("files left half-written, older results changed", seen["half-written"], 0),
        figure("refused by an error line", seen["refused"], None),
        figure("accepted, since they are still valid", seen["accepted"], None),
        figure("slowest", max(one.seconds for one in found), None, "s"),
        figure("largest process", max(one.memory for one in found) / 2**30, None, "GiB"),
    ]
    rows = []
    for route in dict.fromkeys((one.artifact, one.file, one.verb) for one in found):
        some = [one for one in found if (one.artifact, one.file, one.verb) == route]
        counts = Counter(one.outcome for one in some)
        rows.append(
            {
                "file": f"{route[0]}: {route[1]}",
                "given to": route[2],
                "tried": len(some),
                "checksums made to fit": sum(one.signed for one in some),
                "refused": counts["refused"],
                "accepted": counts["accepted"],
                "faults": sum(counts[fault] for fault in _FAULTS),
            }
        )
    return figures, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases that the flags ask for and print the table; ends with 1 where there is a fault."""

    def work(config: FuzzConfig) -> bool:
        found = fuzz(config)
        show(*summarise(found, "python -m tests.reliability.fuzz.fuzz", config.seed))
        return any(one.faulty for one in found)

    run_command("tests.reliability.fuzz.fuzz", __doc__, FuzzConfig, work, arguments)


if __name__ == "__main__":
    main()
