"""Worker that gives hostile input to its routes: ``python -m tests.reliability.hostile.worker FOLDER``.

:mod:`tests.reliability.hostile.hostile` sends it the numbers of the cases (:mod:`tests.reliability.case_process`).
Everything around the case's output, with the home, temporary and working folders, is compared before and after.
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

from tests.reliability import cases as command_cases
from tests.reliability.case_process import limit_memory, open_results, peak_memory, reset_peak, serve_cases
from tests.reliability.fuzz.worker import lay_out, run_and_judge
from tests.reliability.hostile.arrays import arrays, embedding_rows, golden, uint8_graphs
from tests.reliability.hostile.artifacts import cards, graphs, weights
from tests.reliability.hostile.catalogs import links, paths, tables
from tests.reliability.hostile.command_routes import CommandCase, lay_out_inputs
from tests.reliability.hostile.galleries import conditions, galleries, ids, metadata_tables, teachers
from tests.reliability.hostile.images import HostileImage, images
from tests.reliability.hostile.inputs import Hostile, Put
from tests.reliability.hostile.results import plans, reports, storages, thresholds
from tests.reliability.hostile.routes import IMAGE, IMAGE_ROUTES, ROUTES, SetAside, make_originals, open_page
from tests.reliability.hostile.shards import shards
from tests.reliability.hostile.texts import names, recipes, towers
from vpr.artifacts.store import load_artifact
from vpr.cli import silence_libraries

_USER_FOLDERS = {"home": "HOME", "temporary": "TMPDIR", "working": "PWD"}
_States = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """Hostile input on one of its routes; for the fields see :class:`tests.reliability.hostile.inputs.Hostile`."""

    kind: str
    name: str
    expected: str
    route: str
    put: Put


def inputs() -> list[Hostile]:
    """Return all hostile input that is no image; the pairs of kind and name are distinct."""
    makers = (
        *(tables, paths, links, shards, recipes, names, graphs, weights, cards, towers),
        *(arrays, golden, uint8_graphs, embedding_rows),
        *(thresholds, plans, storages, reports),
        *(galleries, metadata_tables, ids, conditions, teachers),
    )
    return [hostile for make in makers for hostile in make()]


@cache
def cases() -> tuple[Case, ...]:
    """Return every input on each of its routes; the routes of one input are adjacent."""
    image_cases = [
        Case(image.kind, image.name, image.expected, route, partial(_put_image, image))
        for image in images()
        for route in IMAGE_ROUTES
    ]
    other_cases = [
        Case(hostile.kind, hostile.name, hostile.expected, route, hostile.put)
        for hostile in inputs()
        for route in hostile.routes
    ]
    return (*image_cases, *other_cases)


def _put_image(image: HostileImage, folder: Path) -> None:
    """Put an image into the shop; its bytes are created for the first route and kept for the others."""
    cached = folder.parent / "made"
    file = cached / f"{image.kind}-{image.name}".replace("/", " ")
    if not file.is_file():
        shutil.rmtree(cached, ignore_errors=True)
        cached.mkdir()
        file.write_bytes(image.make())
    shutil.copyfile(file, folder / "shop" / IMAGE)


def run_case(root: Path, number: int) -> dict[str, Any]:
    """Give one input to one route.

    Args:
        root: Folder of ``originals``, and of ``case``, which is emptied first.
        number: Index in :func:`cases`.

    Returns:
        ``outcome``: as of :func:`tests.reliability.fuzz.worker.run_and_judge`, or ``set aside``, or ``outside`` for a
        change around the output; ``line``; ``seconds`` and ``clock`` of the route alone; ``memory`` of the process.
    """
    case, folder = cases()[number], root / "case"
    route = ROUTES[case.route]
    _warm_up(root, case.route)
    _lay_out(root, route)
    case.put(folder)
    before = _file_states(root)
    reset_peak()
    clock, processor = time.monotonic(), time.process_time()
    result = run_and_judge(folder, route, SetAside)
    usage = {"seconds": round(time.process_time() - processor, 3), "clock": round(time.monotonic() - clock, 3)}
    usage["memory"] = peak_memory()
    if result["outcome"] == SetAside.__name__:
        result["outcome"] = "set aside"
        load_artifact(folder / "out" / "result")
    after = _file_states(root)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        result = {"outcome": "outside", "line": f"changed {', '.join(changed[:5])}"}
    return {**result, **usage}


def _lay_out(root: Path, route: command_cases.Case, with_older: bool = True) -> None:
    """Write a folder without hostile input."""
    originals, folder = root / "originals", root / "case"
    lay_out(originals, folder, route, with_older)
    shutil.copytree(originals / "images", folder / "shop")
    (folder / "in" / "0").mkdir(parents=True)
    shutil.copyfile(folder / "shop" / IMAGE, folder / "in" / "0" / "0.png")
    if isinstance(route, CommandCase):
        lay_out_inputs(originals, folder, route)


def _file_states(root: Path) -> _States:
    """Return the state of each file and folder around the output, which changes when a route writes to it."""
    out = root / "case" / "out"
    states: _States = {}
    for folder, folders, files in os.walk(root):
        if Path(folder) == out:
            folders.clear()
            continue
        for name in (*folders, *files):
            path = Path(folder, name)
            stat = path.lstat()
            state = (stat.st_mode, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            # The time of a folder changes with its contents, which have their own entries.
            states[str(path.relative_to(root))] = state[:2] if path.is_dir() and not path.is_symlink() else state
    return states


def main(root: Path) -> None:
    """Write the originals, then run the cases of the input until it ends."""
    shutil.rmtree(root, ignore_errors=True)  # a worker that died left it
    for name, variable in _USER_FOLDERS.items():
        (root / name).mkdir(parents=True)
        os.environ[variable] = str(root / name)
    tempfile.tempdir = str(root / "temporary")
    results = open_results()
    silence_libraries()
    folder = root / "case"
    folder.mkdir()
    # In another process: its libraries do not count as memory of the routes.
    maker = multiprocessing.get_context("spawn").Process(
        target=make_originals, args=(root / "originals", folder / "shop")
    )
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError("hostile: the originals could not be written. The error is above.")
    os.chdir(root / "working")
    limit_memory()
    serve_cases(partial(run_case, root), results)


@cache
def _warm_up(root: Path, name: str) -> None:
    """Run a route once on harmless input, so that its libraries are loaded and have written their caches.

    Only routes that are due: a process with the libraries of all routes would be larger than any command's.
    """
    folder, route = root / "case", ROUTES[name]
    _lay_out(root, route, with_older=route.older == "stock")  # a gallery that the route changes
    open_page(folder)
    (folder / "in" / "name.txt").write_text("a table", encoding="utf-8")
    result = run_and_judge(folder, route, SetAside)
    if result["outcome"] != "accepted" and not name.startswith(("catalog ", "recipe", "teacher")):
        raise RuntimeError(f"hostile: '{name}' rejects harmless input ({result['line']}). Fix this error first.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
