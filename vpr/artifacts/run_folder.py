"""Unfinished work of a command, next to its output: killed runs resume and processes share the work."""

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.card import CorruptArtifact, Parent, read_card_file
from vpr.artifacts.identity import identity
from vpr.artifacts.paths import CARD_NAME
from vpr.common.distributed import is_first, rank_and_world
from vpr.common.errors import UserError
from vpr.common.locks import file_lock

_POLL_SECONDS = 0.5
_IDENTITY = ("role", "name", "sha256")  # keys of `Parent.identity`


def run_folder(output: str, config: dict[str, Any], parents: list[Parent]) -> Path:
    """Return the folder of a run's logs and unfinished files, named after the output and what is computed.

    Another configuration has another folder, so a run never resumes from another run's checkpoint. Moved inputs do not
    change it; a folder of an earlier version, whose name depends on their paths, is used if it exists.
    """
    of_earlier = _name_folder(output, config, parents)
    return of_earlier if of_earlier.is_dir() else _name_folder(output, identity(config, parents), parents)


def _name_folder(output: str, values: dict[str, Any], parents: list[Parent]) -> Path:
    text = json.dumps([values, [parent.identity for parent in parents]], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Path(output).parent / f"{Path(output).name}.run-{digest}"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Create a run folder and keep other runs out of it; of several processes the first holds the lock for all.

    Raises:
        UserError: Another run uses the folder, or a loader's worker imports the script that started this run.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        fix = 'Put its work under `if __name__ == "__main__":`.'
        raise UserError(f"loader.workers: worker processes import the script that trains. {fix}")
    folder.mkdir(parents=True, exist_ok=True)
    if not is_first():
        yield
        return
    busy = f"{folder}: another process works in this folder. Wait until it ends, then start again."
    try:
        with file_lock(folder / ".lock", busy):
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # empty if the work did not begin


@contextmanager
def atomic_write(path: Path, mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears complete or not at all, whenever the process or the machine stops.

    An existing file is replaced at the end, a link is followed. Mode ``w`` is UTF-8 without translation of line ends.
    """
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial-{rank_and_world()[0]}")
    text = {} if mode == "wb" else {"newline": "", "encoding": "utf-8"}
    try:
        with partial.open(mode, **text) as stream:  # type: ignore[call-overload]
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_save_npy(path: Path, array: NDArray[Any]) -> None:
    """Write a ``.npy`` file with :func:`atomic_write`."""
    with atomic_write(path) as stream:
        np.save(stream, array, allow_pickle=False)


def wait_until(done: Callable[[], bool]) -> None:
    """Wait for another process; torchrun ends all processes when one fails."""
    while not done():
        time.sleep(_POLL_SECONDS)


def is_written(path: str, config: dict[str, Any], parents: list[Parent]) -> bool:
    """Return whether the card at ``path`` has this configuration and these parents; files are not verified."""
    try:
        card = json.loads(read_card_file(Path(path) / CARD_NAME))
        written = card["config"], [{key: parent[key] for key in _IDENTITY} for parent in card["parents"]]
        values = identity(written[0], parents)
    except (CorruptArtifact, OSError, ValueError, KeyError, TypeError, RecursionError):  # not written yet, or no card
        return False
    return (values, written[1]) == (identity(config, parents), [parent.identity for parent in parents])
