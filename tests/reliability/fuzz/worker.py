"""Worker that gives mutated files to the commands: ``python -m tests.reliability.fuzz.worker FOLDER CASE SEED``.

:mod:`tests.reliability.fuzz.fuzz` sends it the numbers of the cases (:mod:`tests.reliability.case_process`).
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from tests.reliability.case_process import limit_memory, open_results, serve_cases
from tests.reliability.cases import ARTIFACTS, CASES, CSV, RESULT, ROUTES, Case, Route, sign
from tests.reliability.fuzz.mutated_files import mutate_file
from vpr.artifacts.store import load_artifact
from vpr.cli import silence_libraries
from vpr.common.errors import UserError

_SHARE_SIGNED = 0.85  # share of the cases whose checksums fit the mutated file
_MAX_LINE = 2100
_OLDER_TABLE = "an older table\n"


def route_of(number: int) -> Route:
    """Return the route of a case; cases go through the routes in turn."""
    return ROUTES[number % len(ROUTES)]


def run_case(originals: Path, folder: Path, seed: int, number: int) -> dict[str, Any]:
    """Mutate one file and run the case that reads its artifact.

    Args:
        originals: Folder of :func:`tests.reliability.cases.make_artifacts`.
        folder: Folder of the case, which is emptied first.
        seed: Seed of all cases.
        number: Number of the case.

    Returns:
        ``mutation`` in words, whether it was ``signed``, and the keys of :func:`run_and_judge`.
    """
    rng, route = np.random.default_rng([seed, number]), route_of(number)
    case = CASES[route.verb]
    lay_out(originals, folder, case)
    path = folder / route.artifact / route.file
    mutation, data = mutate_file(route.file, path.read_bytes(), rng)
    path.write_bytes(data)
    signed = bool(rng.random() < _SHARE_SIGNED)
    if signed:
        sign(folder, route.artifact, route.file)
    return {"mutation": mutation, "signed": signed, **run_and_judge(folder, case)}


def lay_out(originals: Path, folder: Path, case: Case, with_older: bool = True) -> None:
    """Copy all artifacts, and an older result to the output of the case."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    for artifact in ARTIFACTS:
        if (originals / artifact).is_dir():
            shutil.copytree(originals / artifact, folder / artifact)
    if not with_older:
        return
    if case.older == CSV:
        (folder / f"{RESULT}.csv").write_text(_OLDER_TABLE, encoding="utf-8")
    elif (originals / case.older / "card.json").is_file():
        shutil.copytree(originals / case.older, folder / RESULT)
        _make_older(folder / RESULT / "card.json")


def _make_older(card: Path) -> None:
    """Give an artifact another configuration, so that no case skips its work; a gallery is changed as it is."""
    values = json.loads(card.read_bytes())
    if values["kind"] != "gallery":
        card.write_text(json.dumps({**values, "config": {"older": True}}), encoding="utf-8")


def run_and_judge(folder: Path, case: Case, expected: type[Exception] | None = None) -> dict[str, Any]:
    """Run a case and judge how it ended.

    Args:
        folder: Folder as :func:`lay_out` left it, with the changed input.
        case: Case to run.
        expected: Exception of another valid end, after which the result exists.

    Returns:
        ``outcome`` (``accepted``, ``rejected``, ``exception``, ``half-written``, or the name of the expected
        exception) and ``line``, the message or a description of the fault.
    """
    before = _result_bytes(folder)
    try:
        case.run(folder)
        outcome, line = "accepted", ""
    except UserError as error:
        outcome, line = "rejected", str(error)
        if not line.isprintable() or len(line) > _MAX_LINE:
            outcome, line = "exception", f"message is not one printable line: {line[:200]!a}"
    except BaseException as error:
        if expected is not None and isinstance(error, expected):
            return {"outcome": expected.__name__, "line": str(error)}
        frames = traceback.extract_tb(error.__traceback__)
        lines = [
            f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "site-packages" not in frame.filename
        ]
        outcome, line = "exception", f"{type(error).__name__}: {str(error)[:300]!a} at {' '.join(lines[-3:])}"
    fault = _output_fault(folder, case, before, outcome)
    return {"outcome": "half-written", "line": fault} if fault else {"outcome": outcome, "line": line}


def _result_bytes(folder: Path) -> bytes:
    path = next(iter(_outputs(folder)), None)
    if path is None:
        return b""
    return (path / "card.json" if path.is_dir() else path).read_bytes()


def _outputs(folder: Path) -> list[Path]:
    """Return the files at the output, without the run folders that an unfinished command keeps next to it."""
    return [path for path in (folder / "out").iterdir() if not path.name.startswith(f"{Path(RESULT).name}.run-")]


def _output_fault(folder: Path, case: Case, before: bytes, outcome: str) -> str:
    """Describe what is wrong with the output: an extra or partial file, or a changed older result."""
    names = sorted(path.name for path in _outputs(folder))
    expected = {"": [], CSV: ["result.csv"]}.get(case.older, ["result"])
    if outcome != "accepted" and not before:
        expected = []
    if names != expected:
        return f"left {', '.join(names)}"
    if outcome != "accepted" and _result_bytes(folder) != before:
        return "changed the older result"
    if expected == ["result"]:
        try:
            load_artifact(folder / RESULT)
        except UserError as error:
            return str(error)
    elif expected and outcome == "accepted" and not _result_bytes(folder).startswith(b"query,rank,"):
        return "wrote no table"
    return ""


def warm_up(originals: Path, folder: Path) -> None:
    """Run every case on unchanged files, which loads the libraries.

    Raises:
        UserError: A case rejects an unchanged file.
    """
    for name, case in CASES.items():
        lay_out(originals, folder, case, with_older=False)
        result = run_and_judge(folder, case)
        if result["outcome"] != "accepted":
            raise UserError(f"fuzz: '{name}' rejects unchanged files ({result['line']}). Fix this error and rerun.")


def main(originals: Path, folder: Path, seed: int) -> None:
    """Run the cases of the input until it ends."""
    results = open_results()
    silence_libraries()
    warm_up(originals, folder)
    limit_memory()
    serve_cases(lambda number: run_case(originals, folder, seed, number), results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
