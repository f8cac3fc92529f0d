"""Things that happen to the process that calls them: a disk that is full, a wrong clock, a kill at a given step."""

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

from vpr.artifacts import store as artifact

_WRITING = os.O_WRONLY | os.O_RDWR
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod")


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond so many bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def set_clock_back() -> None:
    """Let the clock of this process stand years before, and run backwards from there."""
    seconds = itertools.count(1_000_000_000, -1)  # 2001

    class Past(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(next(seconds), tz)

    time.time = lambda: float(next(seconds))
    time.time_ns = lambda: next(seconds) * 10**9
    artifact.datetime = Past  # type: ignore[attr-defined, misc]


def die_at(step: int, folder: str) -> None:
    """Let this process kill itself just before its n-th change of a file or folder below ``folder``, from 1."""
    left = [step]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES and not (event == "open" and (arguments[2] or 0) & _WRITING):
            return
        # Where a folder is removed with all that it holds, names are relative to it.
        name = str(arguments[0])
        if name.startswith(folder) or not os.path.isabs(name):
            left[0] -= 1
            if not left[0]:
                die()

    sys.addaudithook(watch)


def before_file(number: int, pattern: str, act: Callable[[], object]) -> None:
    """Let this process act once, before it moves its n-th file to a name that the pattern matches, from 1.

    Those before it lie there whole and the run is not done: whatever the machine's speed, this is in the middle of it.
    """
    left = [number]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and fnmatch.fnmatch(str(arguments[1]), pattern):
            left[0] -= 1
            if not left[0]:
                act()

    sys.addaudithook(watch)


def die() -> None:
    """``kill -9`` of this process."""
    os.kill(os.getpid(), signal.SIGKILL)
