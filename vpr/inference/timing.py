"""Latency measurement of several calls in interleaved rounds."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WINDOW = 5
_STEADY_TOLERANCE = 0.05
_MIN_WARMUP_SECONDS = 0.25
_MAX_WARMUP_CALLS = 60
_ROUNDS = 10


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of each round of a call, and whether the call was steady when its warm-up ended."""

    rounds: tuple[NDArray[np.float64], ...]
    warmed_up: bool

    @property
    def milliseconds(self) -> NDArray[np.float64]:
        """Latencies of all rounds, in order."""
        return np.concatenate(self.rounds)


def measure_rounds(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Measurement]:
    """Time calls in 10 interleaved rounds, so that drift of the machine affects all of them equally.

    The warm-up of each call takes at least 10 calls and 0.25 s. It ends when the median of the last 5 calls is within
    5 % of the median of the 5 before, or after 60 calls. The first call of each round is not timed: it refills the
    caches and waits until the threads of the other calls are idle. Every round has at least one timed call.
    ``seconds`` is the duration of the timed calls of each function, over all rounds.
    """
    warmed_up = {name: _warm_up(call, clock) for name, call in calls.items()}
    rounds: dict[str, list[NDArray[np.float64]]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            call()
            rounds[name].append(_time_round(call, seconds / _ROUNDS, clock))
    return {name: Measurement(tuple(rounds[name]), warmed_up[name]) for name in calls}


def measure(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, NDArray[np.float64]]:
    """Return the milliseconds of :func:`measure_rounds` by name, at least 10 each."""
    return {name: measurement.milliseconds for name, measurement in measure_rounds(calls, seconds, clock).items()}


def summarise(milliseconds: NDArray[np.float64]) -> dict[str, float]:
    """Return p50, p90, p99, the maximum and the number of calls."""
    p50, p90, p99 = np.percentile(milliseconds, [50, 90, 99])
    maximum, calls = float(milliseconds.max()), float(len(milliseconds))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": maximum, "calls": calls}


def _time_round(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> NDArray[np.float64]:
    times = []
    deadline = clock() + seconds
    while True:
        start = clock()
        call()
        end = clock()
        times.append(1000 * (end - start))
        if end >= deadline:
            return np.array(times)


def _warm_up(call: Callable[[], object], clock: Callable[[], float]) -> bool:
    """Call until the latency is steady; return False if it is not within 60 calls."""
    times: list[float] = []
    first_start = clock()
    while True:
        start = clock()
        call()
        end = clock()
        times.append(end - start)
        if len(times) < 2 * _WINDOW or end - first_start < _MIN_WARMUP_SECONDS:
            continue
        last, previous = np.median(times[-_WINDOW:]), np.median(times[-2 * _WINDOW : -_WINDOW])
        if abs(last - previous) <= _STEADY_TOLERANCE * previous:
            return True
        if len(times) >= _MAX_WARMUP_CALLS:
            return False
