"""Timing of calls side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WINDOW = 5
_STEADY = 0.05
_WARMUP_SECONDS = 0.25
_MAX_WARMUP = 60
_ROUNDS = 10


@dataclass(frozen=True)
class Measurement:
    """What was seen of one call.

    Attributes:
        rounds: milliseconds of the timed calls of each round.
        warmed_up: Whether the call was steady when its warm-up ended.
    """

    rounds: tuple[NDArray[np.float64], ...]
    warmed_up: bool

    @property
    def milliseconds(self) -> NDArray[np.float64]:
        """Of all rounds, in order."""
        return np.concatenate(self.rounds)


def measure_rounds(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Measurement]:
    """Time calls in 10 interleaved rounds, so that drift of the machine hits all alike.

    Each call is first warmed up until steady: for at least 10 calls and 0.25 s, and on until the median of the last
    5 calls is within 5 % of the median of the 5 before; after 60 calls it is measured all the same. The first call of
    each round is not timed: it fills the caches that the other calls emptied, and waits for their threads to rest.

    Args:
        calls: what is timed, by name.
        seconds: for each call, over all rounds.
        clock: seconds, monotonic.

    Returns:
        by name; every round has at least one timed call.
    """
    settled = {name: _warm_up(call, clock) for name, call in calls.items()}
    rounds: dict[str, list[NDArray[np.float64]]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            call()
            rounds[name].append(_time_round(call, seconds / _ROUNDS, clock))
    return {name: Measurement(tuple(rounds[name]), settled[name]) for name in calls}


def measure(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, NDArray[np.float64]]:
    """The milliseconds of :func:`measure_rounds` by name, at least 10 each."""
    return {name: timed.milliseconds for name, timed in measure_rounds(calls, seconds, clock).items()}


def summarise(milliseconds: NDArray[np.float64]) -> dict[str, float]:
    """p50, p90, p99, the maximum and the number of calls."""
    p50, p90, p99 = np.percentile(milliseconds, [50, 90, 99])
    most, calls = float(milliseconds.max()), float(len(milliseconds))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": most, "calls": calls}


def _time_round(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> NDArray[np.float64]:
    times = []
    until = clock() + seconds
    while True:
        begun = clock()
        call()
        ended = clock()
        times.append(1000 * (ended - begun))
        if ended >= until:
            return np.array(times)


def _warm_up(call: Callable[[], object], clock: Callable[[], float]) -> bool:
    """Call until steady; whether it became so within 60 calls."""
    times: list[float] = []
    started = clock()
    while True:
        begun = clock()
        call()
        ended = clock()
        times.append(ended - begun)
        if len(times) < 2 * _WINDOW or ended - started < _WARMUP_SECONDS:
            continue
        last, before = np.median(times[-_WINDOW:]), np.median(times[-2 * _WINDOW : -_WINDOW])
        if abs(last - before) <= _STEADY * before:
            return True
        if len(times) >= _MAX_WARMUP:
            return False
