"""Run the parts of the check in processes of their own, each within its share of the time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from experiments.figures import Figure, Row
from experiments.gpu_check.parts import PARTS, Part, Skipped
from export.backends.pytorch import TorchBackend
from vpr.common.errors import UserError
from vpr.common.gpus import read_clocks
from vpr.common.log import configure_logging, get_logger

log = get_logger(__name__)

Keep = Callable[[list[Figure], dict[str, list[Row]]], None]
_LEAST_SECONDS = 10  # a part is not started with less time left
_END_SECONDS = 5  # for a process to end by itself


def run_parts(names: Sequence[str], seconds: float, is_rehearsal: bool, keep: Keep) -> list[Row]:
    """Run parts in the order of :data:`PARTS` and return their outcomes.

    Args:
        names: Parts to run, all if empty.
        seconds: Time of all parts together.
        is_rehearsal: Run on the CPU at a small size.
        keep: Called with figures and tables as soon as a part has them, and with the outcomes after each part.

    Raises:
        UserError: There is no part of a name.
    """
    known = [part.name for part in PARTS]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"parts: no part '{unknown[0]}'. Choose from {', '.join(known)}.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports PyTorch once
    start, outcomes = time.monotonic(), list[Row]()
    clocks = ""

    def keep_with_clocks(figures: list[Figure], tables: dict[str, list[Row]]) -> None:
        nonlocal clocks
        clocks = describe_clocks(read_clocks())  # right after a result, when the GPU is still warm
        keep(figures, tables)

    for part in (part for part in PARTS if not names or part.name in names):
        began, clocks = time.monotonic(), ""
        left = seconds - (began - start)
        if reason := _reason_to_skip(part, left, is_rehearsal):
            outcome = f"skipped: {reason}"
        else:
            outcome = _run_part(context, part, min(part.seconds, left), is_rehearsal, keep_with_clocks)
        seconds_taken = f"{time.monotonic() - began:.0f}"
        outcomes.append({"part": part.name, "seconds": seconds_taken, "outcome": outcome, "clock": clocks})
        log.info(f"{part.name}: {outcome}")
        keep([], {"gpu-check": outcomes})
    return outcomes


def describe_clocks(state: dict[str, Any]) -> str:
    """Return the SM clock and what slows it down in words; empty where NVML does not report them."""
    if "sm_clock_mhz" not in state:
        return ""
    text = f"{state['sm_clock_mhz']} of {state.get('max_sm_clock_mhz', '?')} MHz"
    return ", ".join([text, *state.get("throttled", ())])


def _reason_to_skip(part: Part, left: float, is_rehearsal: bool) -> str | None:
    if is_rehearsal and not part.runs_on_cpu:
        return "it needs an NVIDIA GPU"
    if not is_rehearsal and not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    compiler = TorchBackend("", "cpu" if is_rehearsal else "cuda", compiled=True)
    if part.is_compiled and (reason := compiler.missing()):
        return reason
    return None if left >= _LEAST_SECONDS else "no time is left"


def _run_part(context: Any, part: Part, seconds: float, is_rehearsal: bool, keep: Keep) -> str:
    """Run a part in a new process, keep its results as they arrive, and return the outcome."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(part, is_rehearsal, sender))
    process.start()
    sender.close()
    deadline, results = time.monotonic() + seconds, 0
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            message = receiver.recv()
            if isinstance(message, str):
                return message
            keep(*message)
            results += 1
        return f"stopped after {seconds:.0f} s, {results} results kept"
    except EOFError:
        process.join(_END_SECONDS)
        return f"failed: its process ended with exit code {process.exitcode}, {results} results kept"
    finally:
        receiver.close()
        _end(process, wait=time.monotonic() < deadline)


def _end(process: Any, wait: bool) -> None:
    """End a process and those that it started, such as compilers; with ``wait`` it has some seconds to end itself."""
    if wait:
        process.join(_END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own group, see `_work`
    process.kill()
    process.join()


def _work(part: Part, is_rehearsal: bool, sender: Connection) -> None:
    """Send the results of a part, then its outcome."""
    os.setsid()  # the group that `_end` ends
    configure_logging()
    results = 0
    try:
        for result in part.work(is_rehearsal):
            sender.send(result)
            results += 1
        sender.send(f"measured, {results} results")
    except Skipped as reason:
        sender.send(f"skipped: {reason}")
    except Exception as error:  # the other parts go on
        log.exception(part.name)
        sender.send(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
