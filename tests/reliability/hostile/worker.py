"""The process that hostile input is given to: ``python -m tests.reliability.hostile.worker FOLDER``.

It answers numbers of cases (:mod:`tests.reliability.case_process`) for :mod:`tests.reliability.hostile.hostile`. Everything
around a case's folder, with the home, the temporary and the working folder, is compared before and after.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.reliability.case_process import answer, limit_memory, peak_memory, protocol, reset_peak
from tests.reliability.commands import CommandCase
from tests.reliability.fuzz.worker import lay_out, outcome
from tests.reliability.hostile.artifacts import cards, graphs, weights
from tests.reliability.hostile.catalogs import links, paths, tables
from tests.reliability.hostile.images import HostileImage, images
from tests.reliability.hostile.inputs import Hostile, Put
from tests.reliability.hostile.routes import IMAGE, IMAGE_ROADS, ROADS, SetAside, make_originals, warm_up
from tests.reliability.hostile.shards import shards
from tests.reliability.hostile.texts import names, recipes, towers
from vpr.artifacts.store import load_artifact
from vpr.cli import silence_libraries

_HOMES = {"home": "HOME", "temporary": "TMPDIR", "working": "PWD"}
_Seen = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """Hostile input on one of its roads; the fields are those of :class:`tests.reliability.hostile.inputs.Hostile`."""

    kind: str
    name: str
    expected: str
    road: str
    put: Put


def inputs() -> list[Hostile]:
    """All that is no image; no two of a kind and name."""
    makers = (tables, paths, links, shards, recipes, names, graphs, weights, cards, towers)
    return [one for make in makers for one in make()]


@cache
def cases() -> tuple[Case, ...]:
    """Every input on each of its roads; those of one input follow each other."""
    found = [
        Case(one.kind, one.name, one.expected, road, partial(_place, one)) for one in images() for road in IMAGE_ROADS
    ]
    found += [Case(one.kind, one.name, one.expected, road, one.put) for one in inputs() for road in one.roads]
    return tuple(found)


def _place(image: HostileImage, folder: Path) -> None:
    """Put an image into the shop; it is made for its first road and kept for the others."""
    kept = folder.parent / "made"
    file = kept / f"{image.kind}-{image.name}".replace("/", " ")
    if not file.is_file():
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        file.write_bytes(image.make())
    shutil.copyfile(file, folder / "shop" / IMAGE)


def run_case(place: Path, number: int) -> dict[str, Any]:
    """Give one input to one verb.

    Args:
        place: folder of ``originals``, and of ``case``, which is emptied first.
        number: of :func:`cases`.

    Returns:
        ``outcome`` as of :func:`tests.reliability.fuzz.worker.outcome`, or ``set aside``, or ``outside``: something around the
        artifact has changed; ``line``, ``seconds`` and ``clock`` of the verb alone, and ``memory`` of the process.
    """
    case, folder = cases()[number], place / "case"
    verb = ROADS[case.road]
    _lay_out(place, verb)
    case.put(folder)
    before = _seen(place)
    reset_peak()
    clock, processor = time.monotonic(), time.process_time()
    told = outcome(folder, verb, SetAside)
    used = {"seconds": round(time.process_time() - processor, 3), "clock": round(time.monotonic() - clock, 3)}
    used["memory"] = peak_memory()
    if told["outcome"] == SetAside.__name__:
        told["outcome"] = "set aside"
        load_artifact(folder / "out" / "result")
    after = _seen(place)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        told = {"outcome": "outside", "line": f"changed {', '.join(changed[:5])}"}
    return {**told, **used}


def _lay_out(place: Path, verb: CommandCase) -> None:
    """A folder in which nothing is hostile yet."""
    originals, folder = place / "originals", place / "case"
    lay_out(originals, folder, verb)
    shutil.copytree(originals / "images", folder / "shop")
    (folder / "in" / "0").mkdir(parents=True)
    shutil.copyfile(folder / "shop" / IMAGE, folder / "in" / "0" / "0.png")


def _seen(place: Path) -> _Seen:
    """Everything around the artifact that a verb writes: by name, what changes when a file is written to."""
    out = place / "case" / "out"
    found: _Seen = {}
    for folder, folders, files in os.walk(place):
        if Path(folder) == out:
            folders.clear()
            continue
        for name in (*folders, *files):
            path = Path(folder, name)
            state = path.lstat()
            kept = (state.st_mode, state.st_ino, state.st_size, state.st_mtime_ns)
            # A folder's time changes with what is in it, which is listed itself.
            found[str(path.relative_to(place))] = kept[:2] if path.is_dir() and not path.is_symlink() else kept
    return found


def main(place: Path) -> None:
    """Make what the roads need, then answer case by case until the input ends."""
    shutil.rmtree(place, ignore_errors=True)  # of a process that died
    for name, variable in _HOMES.items():
        (place / name).mkdir(parents=True)
        os.environ[variable] = str(place / name)
    tempfile.tempdir = str(place / "temporary")
    answers = protocol()
    silence_libraries()
    folder = place / "case"
    folder.mkdir()
    # In a process of its own: the libraries that it takes are not counted with those of the roads.
    making = multiprocessing.get_context("spawn").Process(
        target=make_originals, args=(place / "originals", folder / "shop")
    )
    making.start()
    making.join()
    if making.exitcode:
        raise RuntimeError("hostile: its artifacts cannot be made: see above")
    os.chdir(place / "working")
    _warm_up(place)
    limit_memory()
    answer(partial(run_case, place), answers)


def _warm_up(place: Path) -> None:
    """Every road once on what nobody has touched, so that libraries are loaded and have written what they keep."""
    folder = place / "case"
    for name, verb in ROADS.items():
        _lay_out(place, verb)
        warm_up(folder)
        (folder / "in" / "name.txt").write_text("a table", encoding="utf-8")
        told = outcome(folder, verb, SetAside)
        if told["outcome"] != "accepted" and not name.startswith(("catalog ", "recipe", "teacher")):
            raise RuntimeError(f"hostile: {name}: does not take harmless input: {told['line']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
