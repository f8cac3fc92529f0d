from __future__ import annotations

import numpy as np
import pytest

from benchmarks.latency.open_loop import Load, answer_requests, measure_under_load, schedule_requests
from vpr.common.errors import UserError


class Machine:
    """Simulated clock; a call takes 10 ms unless it stalls."""

    def __init__(self, stalls: dict[int, float] | None = None) -> None:
        self.now, self.calls, self.stalls = 100.0, 0, stalls or {}

    def clock(self) -> float:
        return self.now

    def wait(self, due: float) -> None:
        assert due > self.now
        self.now = due

    def call(self) -> None:
        self.now += self.stalls.get(self.calls, 0.01)
        self.calls += 1


WARMUP = 3


def test_stall_delays_every_request_due_during_it() -> None:
    """Requests come every 100 ms and take 10 ms. The third takes 450 ms, and four more become due meanwhile."""
    machine = Machine({WARMUP + 2: 0.45})
    answers = answer_requests(machine.call, schedule_requests(Load("fixed", 10), 1.0), machine.clock, machine.wait)
    # The request due at 200 is answered at 650; those due at 300, 400, 500, 600 at 660, 670, 680, 690.
    np.testing.assert_allclose(answers.latency, [10, 10, 450, 360, 270, 180, 90, 10, 10, 10])
    # A closed loop would have measured one slow call.
    np.testing.assert_allclose(answers.service, [10, 10, 450, 10, 10, 10, 10, 10, 10, 10])
    assert answers.seconds == pytest.approx(0.91)
    row = answers.summary()
    assert row["p90"] > 300
    assert row["busy"] == pytest.approx(0.54 / 0.91)
    assert row["requests_per_s"] == pytest.approx(10 / 0.91)
    assert row["calls"] == 10


def test_queue_grows_without_end_above_the_capacity() -> None:
    machine = Machine()
    answers = answer_requests(machine.call, schedule_requests(Load("fixed", 200), 1.0), machine.clock, machine.wait)
    np.testing.assert_allclose(answers.latency, 10 + 5 * np.arange(200))
    assert answers.summary()["busy"] == pytest.approx(1)


def test_poisson_arrivals_queue_as_in_theory() -> None:
    """Poisson arrivals, constant service (M/D/1): the mean wait is u / (2 (1 - u)) services (Pollaczek-Khinchine)."""
    machine = Machine()
    answers = answer_requests(
        machine.call, schedule_requests(Load("poisson", 80, seed=3), 2000.0), machine.clock, machine.wait
    )
    assert answers.latency.mean() - 10 == pytest.approx(10 * 0.8 / (2 * 0.2), rel=0.05)


def test_schedules_have_their_rate_and_repeat_by_seed() -> None:
    fixed = schedule_requests(Load("fixed", 4), 2.0)
    np.testing.assert_allclose(fixed, np.arange(8) / 4)
    random = schedule_requests(Load("poisson", 50, seed=1), 400.0)
    gaps = np.diff(random)
    assert random[0] == 0
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential
    np.testing.assert_array_equal(random, schedule_requests(Load("poisson", 50, seed=1), 400.0))
    assert not np.array_equal(random, schedule_requests(Load("poisson", 50, seed=2), 400.0))
    assert len(schedule_requests(Load("fixed", 0.001), 1.0)) == 1


def test_default_rate_is_80_percent_of_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="rate: expected more than 0 requests per second, got -1"):
        schedule_requests(Load("fixed", -1), 1.0)
    monkeypatch.setattr("benchmarks.latency.open_loop.measure_capacity", lambda call, seconds: 5000.0)
    load = measure_under_load(lambda: None, Load("fixed"), 0.01)
    assert load.rate == pytest.approx(4000)
    assert load.arrivals == "fixed"
    assert load.calls == 40
