"""Worker process that runs cases by their numbers, with a watchdog for crashes and hangs.

The protocol is one line of JSON each: ``{}`` once the worker is ready, then one result for each number on its input.
"""

from __future__ import annotations

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

import psutil

from vpr.common.errors import UserError

_MAX_WAIT = 60.0  # seconds by the clock, for a worker that waits without computing
_MAX_START = 900.0  # the same, to load the libraries and run every command once
_POLL_SECONDS = 0.1
_EXTRA_MEMORY = 4 << 30  # bytes of address space beyond those of the loaded libraries


class Worker:
    """A process that runs cases; it starts with the first case and again after each death.

    Args:
        command: Command line of the worker.
        log: File for everything that the worker prints.
        max_seconds: Processor time that one case may take.
    """

    def __init__(self, command: list[str], log: Path, max_seconds: float) -> None:
        self._command, self._log, self._max_seconds = command, log, max_seconds
        self._process: psutil.Popen | None = None

    def run(self, case: int) -> dict[str, Any]:
        """Return the worker's result, or the outcome ``crash`` or ``hang``."""
        process = self._start()
        with suppress(BrokenPipeError):  # the worker died after its last result; _next_result reports the crash
            process.stdin.write(f"{case}\n")
            process.stdin.flush()
        return self._next_result(process, self._max_seconds, _MAX_WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        """Kill the process."""
        if self._process is not None:
            with suppress(psutil.NoSuchProcess):
                self._process.kill()
            self._process.communicate()
            self._process = None

    def _log_tail(self) -> str:
        return " ".join(self._log.read_text(encoding="utf-8", errors="replace")[-300:].split())

    def _start(self) -> psutil.Popen:
        if self._process is None:
            with self._log.open("w") as log:
                self._process = psutil.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            if self._next_result(self._process, _MAX_START, _MAX_START):
                raise UserError(f"worker: it does not start ({self._log_tail()}). Fix this error and rerun.")
        return self._process

    def _next_result(self, process: psutil.Popen, max_processor: float, max_clock: float) -> dict[str, Any]:
        """Return the next line, or the outcome ``crash`` or ``hang`` after the given seconds."""
        clock_end = time.monotonic() + max_clock
        processor_end = _processor_seconds(process) + max_processor
        ready: list[Any] = []
        while not ready and time.monotonic() < clock_end and _processor_seconds(process) < processor_end:
            ready, _, _ = select.select([process.stdout], [], [], _POLL_SECONDS)
        if ready and (line := process.stdout.readline()):
            return json.loads(line)
        if not ready:
            process.kill()
        code = process.wait()
        self._close()
        if not ready:
            return {"outcome": "hang", "line": ""}
        end = f"signal {-code}" if code < 0 else f"exit status {code}"
        return {"outcome": "crash", "line": f"{end}: {self._log_tail()}"}


def _processor_seconds(process: psutil.Process) -> float:
    """Return the processor time of all threads so far."""
    times = process.cpu_times()
    return times.user + times.system


def limit_memory() -> None:
    """Limit the address space of this process to some gigabytes beyond its present size."""
    size = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (size + _EXTRA_MEMORY, resource.RLIM_INFINITY))


def reset_peak() -> None:
    """Reset the largest resident size of this process, and return freed memory to the system."""
    gc.collect()
    psutil.heap_trim()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Return the largest resident size of this process since :func:`reset_peak`, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve_cases(run: Callable[[int], dict[str, Any]], results: TextIO) -> None:
    """Report that the worker is ready, then run each case number of the input until the input ends."""
    print("{}", file=results, flush=True)
    for line in sys.stdin:
        reset_peak()
        start = time.process_time()
        result = run(int(line))
        result.setdefault("seconds", round(time.process_time() - start, 3))
        result.setdefault("memory", peak_memory())
        print(json.dumps(result), file=results, flush=True)


def open_results() -> TextIO:
    """Return a stream for results, and redirect what commands and libraries print to the errors."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream
