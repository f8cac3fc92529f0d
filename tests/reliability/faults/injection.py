"""Faults in the calling process: a full disk, a wrong clock, a kill at a given step."""

from __future__ import annotations

import fnmatch
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime, tzinfo
from typing import Any, Self

from vpr.artifacts import writer

_WRITING = os.O_WRONLY | os.O_RDWR
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod")


def limit_file_size(size: int) -> None:
    """Let no file of this process grow beyond so many bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def set_clock_back() -> None:
    """Set the clock of this process to 2001, and let it run backwards from there."""
    seconds = itertools.count(1_000_000_000, -1)

    class BackwardDatetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(next(seconds), tz)

    time.time = lambda: float(next(seconds))
    time.time_ns = lambda: next(seconds) * 10**9
    writer.datetime = BackwardDatetime  # type: ignore[attr-defined, misc]


def kill_at_change(number: int, folder: str) -> None:
    """Kill this process just before its n-th change of a file or folder below ``folder``, counted from 1."""
    remaining = [number]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES and not (event == "open" and (arguments[2] or 0) & _WRITING):
            return
        # Names are relative where a folder is removed with its contents.
        name = str(arguments[0])
        if name.startswith(folder) or not os.path.isabs(name):
            remaining[0] -= 1
            if not remaining[0]:
                die()

    sys.addaudithook(count)


def before_file(number: int, pattern: str, act: Callable[[], object]) -> None:
    """Call ``act`` before this process renames its n-th file to a matching name, counted from 1.

    Earlier files are complete and the command has not finished: at any speed of the machine this is in the middle.
    """
    remaining = [number]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and fnmatch.fnmatch(str(arguments[1]), pattern):
            remaining[0] -= 1
            if not remaining[0]:
                act()

    sys.addaudithook(count)


def die() -> None:
    """Send SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)
