"""Requests that come when they come: latencies at a given rate of arrivals, from the times they were due.

A closed loop sends the next request when the last one is answered, so a stall delays one request and the others are
simply never sent ("coordinated omission", Tene, "How NOT to Measure Latency", 2013). Here every request has its
time beforehand, and all that come due during a stall wait, and are seen to wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.inference.timing import measure_rounds, summarise

Arrivals = Literal["poisson", "fixed"]
# Of what a model answers one after another; at 100 % the queue would grow without end.
SHARE = 0.8
_SPIN = 0.001
_WARMUP = 3


@dataclass(frozen=True)
class Load:
    """How requests come.

    Attributes:
        arrivals: ``fixed`` are evenly spaced, ``poisson`` have exponential gaps, as independent users make them.
        rate: requests per second, on average; 0 is 80 % of what is answered one after another.
        seed: of the gaps.
    """

    arrivals: Arrivals
    rate: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answered:
    """Requests in the order of their times.

    Attributes:
        latency: milliseconds from when each was due to its answer.
        service: milliseconds that the call itself took.
        seconds: from the first due time to the last answer.
    """

    latency: NDArray[np.float64]
    service: NDArray[np.float64]
    seconds: float

    @property
    def row(self) -> dict[str, Any]:
        """p50, p90, p99, max and calls of the latency, p99 of the service alone, requests per second, busy share."""
        busy = float(self.service.sum()) / 1000 / self.seconds
        alone = {"service_p99": float(np.percentile(self.service, 99)), "busy": busy}
        return {**summarise(self.latency), **alone, "requests_per_s": len(self.latency) / self.seconds}


def answer_load(call: Callable[[], object], load: Load, seconds: float) -> dict[str, Any]:
    """Answer requests for some seconds, at 80 % of the measured capacity where the load names no rate.

    Returns:
        ``arrivals``, ``rate`` and the numbers of :class:`Answered`. There are no intervals of the quantiles: requests
        that queue behind each other are not independent.
    """
    load = replace(load, rate=load.rate or SHARE * capacity(call, seconds))
    answered = answer(call, schedule(load, seconds))
    return {"arrivals": load.arrivals, "rate": load.rate, **answered.row}


def capacity(call: Callable[[], object], seconds: float) -> float:
    """Calls per second, one after another."""
    (timed,) = measure_rounds({"": call}, seconds).values()
    return 1000 / float(timed.milliseconds.mean())


def schedule(load: Load, seconds: float) -> NDArray[np.float64]:
    """Seconds at which requests are due, ascending, the first at 0; at least one."""
    if load.rate <= 0:
        raise UserError(f"rate: {load.rate}: give requests per second above 0")
    count = max(1, round(load.rate * seconds))
    if load.arrivals == "fixed":
        return np.arange(count) / load.rate
    gaps = np.random.default_rng(load.seed).exponential(1 / load.rate, count - 1)
    return np.concatenate([[0.0], np.cumsum(gaps)])


def wait_until(due: float) -> None:
    """Sleep until a millisecond before ``time.perf_counter()`` is there, and spin the rest: sleep wakes up late."""
    left = due - time.perf_counter()
    if left > _SPIN:
        time.sleep(left - _SPIN)
    while time.perf_counter() < due:
        pass


def answer(
    call: Callable[[], object],
    due: NDArray[np.float64],
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[float], None] = wait_until,
) -> Answered:
    """Answer requests one at a time, in order, each as soon as it is due and the one before it is answered.

    Args:
        call: answers one request.
        due: of :func:`schedule`.
        clock: seconds, monotonic.
        wait: returns when the clock is at the given time.
    """
    for _ in range(_WARMUP):
        call()
    started = clock()
    latency, service = [], []
    for moment in due:
        if clock() < started + moment:
            wait(started + moment)
        begun = clock()
        call()
        ended = clock()
        latency.append(1000 * (ended - started - moment))
        service.append(1000 * (ended - begun))
    return Answered(np.array(latency), np.array(service), clock() - started)
