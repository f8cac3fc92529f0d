"""Open-loop load: latencies at a given rate of arrivals, measured from the times when requests were due.

A closed loop sends the next request after the last answer, so a stall delays one request and the requests that would
have come meanwhile are never sent ("coordinated omission", Tene, "How NOT to Measure Latency", 2013). Here every
request has a scheduled time, so a stall counts for every request that becomes due during it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.schema import OpenLoop
from vpr.common.errors import UserError
from vpr.inference.timing import measure_rounds, summarise

Arrivals = Literal["poisson", "fixed"]
# Default rate as a share of the closed-loop rate; at 100 % the queue would grow without end.
CAPACITY_SHARE = 0.8
_SPIN_SECONDS = 0.001
_WARMUP = 3


@dataclass(frozen=True)
class Load:
    """Arrival process of requests."""

    arrivals: Arrivals  # ``fixed`` arrivals are evenly spaced; ``poisson`` has exponential gaps, like independent users
    rate: float = 0.0  # mean number of requests per second; 0 is 80 % of the closed-loop rate
    seed: int = 0  # seed of the gaps


@dataclass(frozen=True)
class Answers:
    """Answered requests in the order of their due times."""

    latency: NDArray[np.float64]  # (requests,) float64, milliseconds from due time to answer
    service: NDArray[np.float64]  # (requests,) float64, milliseconds of the call alone
    seconds: float  # seconds from the first due time to the last answer

    def summary(self) -> dict[str, float]:
        """Return the numbers of :class:`OpenLoop`, without intervals: requests in one queue are not independent."""
        busy = float(self.service.sum()) / 1000 / self.seconds
        service = {"service_p99": float(np.percentile(self.service, 99)), "busy": busy}
        return {**summarise(self.latency), **service, "requests_per_s": len(self.latency) / self.seconds}


def measure_under_load(call: Callable[[], object], load: Load, seconds: float) -> OpenLoop:
    """Answer requests for some seconds, by default at 80 % of the measured capacity."""
    load = replace(load, rate=load.rate or CAPACITY_SHARE * measure_capacity(call, seconds))
    answers = answer_requests(call, schedule_requests(load, seconds))
    return OpenLoop(arrivals=load.arrivals, rate=load.rate, **answers.summary())


def measure_capacity(call: Callable[[], object], seconds: float) -> float:
    """Return the calls per second in a closed loop."""
    (measurement,) = measure_rounds({"": call}, seconds).values()
    return 1000 / float(measurement.milliseconds.mean())


def schedule_requests(load: Load, seconds: float) -> NDArray[np.float64]:
    """Return the seconds at which requests are due: at least one, ascending, the first at 0."""
    if load.rate <= 0:
        raise UserError(f"rate: expected more than 0 requests per second, got {load.rate}. Change --rate.")
    count = max(1, round(load.rate * seconds))
    if load.arrivals == "fixed":
        return np.arange(count) / load.rate
    gaps = np.random.default_rng(load.seed).exponential(1 / load.rate, count - 1)
    return np.concatenate([[0.0], np.cumsum(gaps)])


def wait_until(due: float) -> None:
    """Wait until ``time.perf_counter()`` reaches a time; spin in the last millisecond, because sleep wakes up late."""
    remaining = due - time.perf_counter()
    if remaining > _SPIN_SECONDS:
        time.sleep(remaining - _SPIN_SECONDS)
    while time.perf_counter() < due:
        pass


def answer_requests(
    call: Callable[[], object],
    due: NDArray[np.float64],
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[float], None] = wait_until,
) -> Answers:
    """Answer requests one at a time, in order, each when it is due and the previous one is answered.

    ``due`` are seconds from :func:`schedule_requests`, on a monotonic ``clock``; ``wait`` returns when the clock
    reaches a time.
    """
    for _ in range(_WARMUP):
        call()
    first_due = clock()
    latency, service = [], []
    for offset in due:
        if clock() < first_due + offset:
            wait(first_due + offset)
        start = clock()
        call()
        end = clock()
        latency.append(1000 * (end - first_due - offset))
        service.append(1000 * (end - start))
    return Answers(np.array(latency), np.array(service), clock() - first_due)
