"""What a run keeps beside its output until it is finished: a killed one goes on, and processes share the work."""

from __future__ import annotations

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

from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import CorruptArtifact, Parent, read_card_file
from vpr.common.distributed import is_first, rank_and_world
from vpr.common.errors import UserError
from vpr.common.locks import file_lock

_WAIT = 0.5  # seconds between looks for what other processes write


def run_folder(output: str, config: dict[str, Any], parents: list[Parent]) -> Path:
    """Folder of a run's logs and unfinished files, beside its output and named after what it computes.

    Another configuration has another folder, so a run never resumes from a stranger's checkpoint.
    """
    identity = json.dumps([config, [p.model_dump() for p in parents]], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Path(output).parent / f"{Path(output).name}.run-{digest}"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Make a run's folder and let no other run work in it meanwhile; of several processes the first asks for all.

    Raises:
        UserError: another run works in it, or the script that began this one is imported by a process of its loader.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "loader.workers: processes that read images import the script that trains: put what it does under "
            'if __name__ == "__main__":'
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not is_first():
        yield
        return
    try:
        with file_lock(
            folder / ".lock", f"{folder}: another process is at work here: wait for its end, then start again"
        ):
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # empty where nothing was begun


@contextmanager
def atomic_write(path: Path, mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """A file that is there whole or not at all, whenever the process or the machine stops; text has no line ends added.

    Args:
        path: of the file; one that is there is replaced at the end, a link is followed.
        mode: of bytes, or of text in UTF-8.
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
    """Write a ``.npy`` file by :func:`atomic_write`."""
    with atomic_write(path) as stream:
        np.save(stream, array, allow_pickle=False)


def wait_until(done: Callable[[], bool]) -> None:
    """Until another process is done; torchrun ends all when one fails."""
    while not done():
        time.sleep(_WAIT)


def is_written(path: str, config: dict[str, Any], parents: list[Parent]) -> bool:
    """Whether the card that lies there is this one; the files behind it are verified once it is."""
    try:
        card = json.loads(read_card_file(Path(path) / CARD_NAME))
        found = card["config"], card["parents"]
    except (CorruptArtifact, OSError, ValueError, KeyError, TypeError, RecursionError):  # not there yet, or no card
        return False
    return found == (json.loads(json.dumps(config)), [parent.model_dump() for parent in parents])
