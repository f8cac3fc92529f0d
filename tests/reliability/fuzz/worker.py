"""The process that gives mutated files to the verbs: ``python -m tests.reliability.fuzz.worker FOLDER SEED``.

It answers numbers of cases (:mod:`tests.reliability.case_process`) for :mod:`tests.reliability.fuzz.fuzz`.
"""

from __future__ import annotations

import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from tests.reliability.case_process import answer, limit_memory, protocol
from tests.reliability.commands import ARTIFACTS, COMMAND_CASES, RESULT, ROUTES, CommandCase, Route, sign
from tests.reliability.fuzz.mutated_files import mutate_file
from vpr.artifacts.store import load_artifact
from vpr.cli import silence_libraries
from vpr.common.errors import UserError

_SIGNED = 0.85  # share of the cases in which the checksums are made to fit the mutated file
_LONGEST_LINE = 2100
_TABLE = "an older table\n"


def route_of(case: int) -> Route:
    """The road of a case; they take turns."""
    return ROUTES[case % len(ROUTES)]


def run_case(originals: Path, folder: Path, seed: int, case: int) -> dict[str, Any]:
    """Mutate one file and give its artifact to a verb.

    Args:
        originals: artifacts of :func:`tests.reliability.commands.make_artifacts`.
        folder: emptied first; what the verb is given and what it leaves.
        seed: of all cases.
        case: number; with the seed it says everything.

    Returns:
        ``mutation`` in words, and what :func:`outcome` tells.
    """
    rng, route = np.random.default_rng([seed, case]), route_of(case)
    verb = COMMAND_CASES[route.verb]
    lay_out(originals, folder, verb)
    path = folder / route.artifact / route.file
    what, data = mutate_file(route.file, path.read_bytes(), rng)
    path.write_bytes(data)
    signed = bool(rng.random() < _SIGNED)
    if signed:
        sign(folder, route.artifact, route.file)
    return {"mutation": what, "signed": signed, **outcome(folder, verb)}


def lay_out(originals: Path, folder: Path, verb: CommandCase) -> None:
    """Copies of all artifacts, and an older result of the verb at its output."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    for artifact in ARTIFACTS:
        if (originals / artifact).is_dir():
            shutil.copytree(originals / artifact, folder / artifact)
    if verb.result == "csv":
        (folder / f"{RESULT}.csv").write_text(_TABLE, encoding="utf-8")
    elif (originals / verb.result / "card.json").is_file():
        shutil.copytree(originals / verb.result, folder / RESULT)


def outcome(folder: Path, verb: CommandCase, expected: type[Exception] | None = None) -> dict[str, Any]:
    """What became of a verb.

    Args:
        folder: as :func:`lay_out` left it, with what the verb is to be given.
        verb: is run.
        expected: an exception that tells another good end of the verb, after which its result is there.

    Returns:
        ``outcome``: ``accepted``, ``refused``, ``exception``, ``half-written``, or the expected exception's name;
        ``line`` says more.
    """
    before = _result(folder)
    try:
        verb.run(folder)
        ended, line = "accepted", ""
    except UserError as error:
        ended, line = "refused", str(error)
        if not line.isprintable() or len(line) > _LONGEST_LINE:
            ended, line = "exception", f"no line for a terminal: {line[:200]!a}"
    except BaseException as error:
        if expected is not None and isinstance(error, expected):
            return {"outcome": expected.__name__, "line": str(error)}
        last = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(one.filename).name}:{one.lineno}" for one in last if "site-packages" not in one.filename]
        ended, line = "exception", f"{type(error).__name__}: {str(error)[:300]!a} at {' '.join(ours[-3:])}"
    fault = _fault(folder, verb, before, ended)
    return {"outcome": "half-written", "line": fault} if fault else {"outcome": ended, "line": line}


def _result(folder: Path) -> bytes:
    path = next(iter(_left(folder)), None)
    if path is None:
        return b""
    return (path / "card.json" if path.is_dir() else path).read_bytes()


def _left(folder: Path) -> list[Path]:
    """What lies at the output, but for the parts that a run which did not end keeps beside it."""
    return [path for path in (folder / "out").iterdir() if not path.name.startswith(f"{Path(RESULT).name}.run-")]


def _fault(folder: Path, verb: CommandCase, before: bytes, outcome: str) -> str:
    """What is wrong with what a verb left behind: more than its result, a part of it, or a changed older one."""
    names = sorted(path.name for path in _left(folder))
    expected = {"": [], "csv": ["result.csv"]}.get(verb.result, ["result"])
    if outcome != "accepted" and not before:
        expected = []
    if names != expected:
        return f"left {', '.join(names)}"
    if outcome != "accepted" and _result(folder) != before:
        return "changed the older result"
    if expected == ["result"]:
        try:
            load_artifact(folder / RESULT)
        except UserError as error:
            return str(error)
    elif expected and outcome == "accepted" and not _result(folder).startswith(b"query,rank,"):
        return "wrote no table"
    return ""


def warm_up(originals: Path, folder: Path) -> None:
    """Run every verb on files that nobody mutated, so that libraries are loaded; none may refuse them."""
    for name, verb in COMMAND_CASES.items():
        lay_out(originals, folder, verb)
        told = outcome(folder, verb)
        if told["outcome"] != "accepted":
            raise UserError(f"fuzz: {name}: unmutated files are not accepted: {told['line']}: mend that first")


def main(originals: Path, folder: Path, seed: int) -> None:
    """Answer case by case until the input ends."""
    answers = protocol()
    silence_libraries()
    warm_up(originals, folder)
    limit_memory()
    answer(lambda case: run_case(originals, folder, seed, case), answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
