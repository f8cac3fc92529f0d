"""Timing of calls side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

_WINDOW = 5
_STEADY = 0.05
_MAX_WARMUP = 60
_ROUNDS = 10


def measure(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, NDArray[np.float64]]:
    """Time calls in interleaved rounds, so that drift of the machine hits all alike.

    Each call is first warmed up until steady: the median of the last 5 calls is within 5 % of the median
    of the 5 before (60 calls at most).

    Args:
        calls: what is timed, by name.
        seconds: for each call, over all rounds.
        clock: seconds, monotonic.

    Returns:
        milliseconds of every timed call, by name; at least 10 each.
    """
    for call in calls.values():
        _warm_up(call, clock)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            until = clock() + seconds / _ROUNDS
            while True:
                begun = clock()
                call()
                ended = clock()
                times[name].append(1000 * (ended - begun))
                if ended >= until:
                    break
    return {name: np.array(values) for name, values in times.items()}


def summarise(milliseconds: NDArray[np.float64]) -> dict[str, float]:
    """p50, p90, p99 and the number of calls."""
    p50, p90, p99 = np.percentile(milliseconds, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "calls": float(len(milliseconds))}


def _warm_up(call: Callable[[], object], clock: Callable[[], float]) -> None:
    times: list[float] = []
    while len(times) < _MAX_WARMUP:
        begun = clock()
        call()
        times.append(clock() - begun)
        if len(times) >= 2 * _WINDOW:
            last, before = np.median(times[-_WINDOW:]), np.median(times[-2 * _WINDOW : -_WINDOW])
            if abs(last - before) <= _STEADY * before:
                return
