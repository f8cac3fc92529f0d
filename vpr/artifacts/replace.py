"""Replacement of a directory by a finished one, and repair after a writer was killed."""

import glob
import os
import shutil
from pathlib import Path

from vpr.common.locks import file_lock


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_path(target: Path) -> Path:
    """Return the lock file of the writers of ``target``."""
    return target.parent / f".{target.name}.lock"


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def replace_directory(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target`` and leave an older ``target`` under the name of ``new``."""
    # Directories cannot be exchanged portably in one call. `remove_leftovers` repairs a kill between the two renames.
    if target.exists():
        target.rename(_previous(target))
    new.rename(target)
    sync(target.parent)
    if _previous(target).exists():
        _previous(target).rename(new)  # the caller removes it; a directory named "previous" is always complete


def leftovers(target: Path) -> list[Path]:
    """Return files and directories of killed or running writers of ``target``."""
    partial = target.parent.glob(f".{glob.escape(target.name)}.partial-*")
    return [*partial, *(path for path in (_previous(target), lock_path(target)) if path.exists())]


def remove_leftovers(target: Path) -> None:
    """Repair and remove leftovers of killed writers; the caller holds the lock."""
    if _previous(target).is_dir() and not target.exists():
        _previous(target).rename(target)
    for path in leftovers(target):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def restore_previous(target: Path) -> None:
    """Give an artifact its name back if its writer was killed between the two renames."""
    if _previous(target).is_dir() and not target.exists():
        with file_lock(lock_path(target)):
            remove_leftovers(target)
