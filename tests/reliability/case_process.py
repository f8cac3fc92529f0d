"""A process that is given cases by their numbers, and who watches it: it may crash or hang.

They talk in lines: once the process is ready it writes ``{}``, then for each number a line of JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TextIO

from vpr.common.errors import UserError

_STILL = 60.0  # seconds by the clock, for what waits without working
_START = 900.0  # the same, for a worker to load its libraries and run every verb once
_TICKS = os.sysconf("SC_CLK_TCK")
_LOOK = 0.1
_MORE_MEMORY = 4 << 30  # address space beyond what the libraries have taken once they have run


class Worker:
    """A process that answers cases, started when it is needed and after each death.

    Args:
        command: that starts it; it writes a first line when it is ready.
        log: file of what else it writes.
        longest: seconds of processor time that an answer may take.
    """

    def __init__(self, command: list[str], log: Path, longest: float) -> None:
        self._command, self._log, self._longest = command, log, longest
        self._process: subprocess.Popen[str] | None = None

    def ask(self, case: int) -> dict[str, Any]:
        """The worker's answer, or ``crash`` or ``hang``."""
        process = self._started()
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has died since its last answer, which is told below
            process.stdin.write(f"{case}\n")
            process.stdin.flush()
        return self._next_answer(process, self._longest, _STILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _last_words(self) -> str:
        """The end of what the process wrote."""
        return " ".join(self._log.read_text(encoding="utf-8", errors="replace")[-300:].split())

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            if self._next_answer(self._process, _START, _START):
                raise UserError(f"fuzz: its worker does not start: {self._last_words()}: mend that first")
        return self._process

    def _next_answer(self, process: subprocess.Popen[str], working: float, waiting: float) -> dict[str, Any]:
        """The next line; ``crash`` or ``hang`` if none comes within seconds of work and seconds by the clock."""
        assert process.stdout is not None
        until, spent = time.monotonic() + waiting, _processor_seconds(process.pid) + working
        ready: list[Any] = []
        while not ready and time.monotonic() < until and _processor_seconds(process.pid) < spent:
            ready, _, _ = select.select([process.stdout], [], [], _LOOK)
        if ready and (line := process.stdout.readline()):
            return json.loads(line)
        if not ready:
            process.kill()
        code = process.wait()
        self._close()
        if not ready:
            return {"outcome": "hang", "line": ""}
        ended = f"signal {-code}" if code < 0 else f"exit status {code}"
        return {"outcome": "crash", "line": f"{ended}: {self._last_words()}"}


def _processor_seconds(process: int) -> float:
    """That a process has used so far, all threads together."""
    after_name = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / _TICKS


def limit_memory() -> None:
    """Let the process take no more than some gigabytes beyond what it has."""
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MORE_MEMORY, resource.RLIM_INFINITY))


def reset_peak() -> None:
    """Forget the largest resident size so far, and give back what earlier cases have freed."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Largest resident size of this process since :func:`reset_peak`, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer(run: Callable[[int], dict[str, Any]], answers: TextIO) -> None:
    """Say that the process is ready, then answer each number that its input gives, until it ends."""
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        reset_peak()
        begun = time.process_time()
        told = run(int(line))
        told.setdefault("seconds", round(time.process_time() - begun, 3))
        told.setdefault("memory", peak_memory())
        print(json.dumps(told), file=answers, flush=True)


def protocol() -> TextIO:
    """Where answers go: verbs and libraries may print what they like, which goes with the errors."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own
