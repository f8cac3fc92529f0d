"""Things that happen to the process that calls them: a disk that is full, a wrong clock, a kill at a given step."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import time
from datetime import datetime, tzinfo
from typing import Any, Self

from vpr import artifact

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
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
