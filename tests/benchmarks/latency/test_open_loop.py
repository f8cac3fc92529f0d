from __future__ import annotations

import numpy as np
import pytest

from benchmarks.latency.open_loop import Load, answer, answer_load, schedule
from vpr.common.errors import UserError


class Machine:
    """A clock, and a call that costs 10 ms of it but for one that stalls."""

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


def test_a_stall_shows_in_every_request_that_was_due_during_it() -> None:
    """100 ms between requests, 10 ms each; the third takes 450 ms, and four more come due meanwhile."""
    machine = Machine({WARMUP + 2: 0.45})
    seen = answer(machine.call, schedule(Load("fixed", 10), 1.0), machine.clock, machine.wait)
    # Due at 200: answered at 650. Those due at 300, 400, 500, 600 are answered at 660, 670, 680, 690.
    np.testing.assert_allclose(seen.latency, [10, 10, 450, 360, 270, 180, 90, 10, 10, 10])
    # What a closed loop would have told: one slow call.
    np.testing.assert_allclose(seen.service, [10, 10, 450, 10, 10, 10, 10, 10, 10, 10])
    assert seen.seconds == pytest.approx(0.91)
    row = seen.row
    assert row["p90"] > 300
    assert row["busy"] == pytest.approx(0.54 / 0.91)
    assert row["requests_per_s"] == pytest.approx(10 / 0.91)
    assert row["calls"] == 10


def test_more_than_can_be_answered_queues_without_end() -> None:
    machine = Machine()
    seen = answer(machine.call, schedule(Load("fixed", 200), 1.0), machine.clock, machine.wait)
    np.testing.assert_allclose(seen.latency, 10 + 5 * np.arange(200))
    assert seen.row["busy"] == pytest.approx(1)


def test_random_arrivals_queue_as_theory_says() -> None:
    """Poisson arrivals, constant service (M/D/1): the mean wait is u / (2 (1 - u)) services (Pollaczek-Khinchine)."""
    machine = Machine()
    seen = answer(machine.call, schedule(Load("poisson", 80, seed=3), 2000.0), machine.clock, machine.wait)
    assert seen.latency.mean() - 10 == pytest.approx(10 * 0.8 / (2 * 0.2), rel=0.05)


def test_schedules_have_their_rate_and_repeat_by_seed() -> None:
    fixed = schedule(Load("fixed", 4), 2.0)
    np.testing.assert_allclose(fixed, np.arange(8) / 4)
    random = schedule(Load("poisson", 50, seed=1), 400.0)
    gaps = np.diff(random)
    assert random[0] == 0
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential
    np.testing.assert_array_equal(random, schedule(Load("poisson", 50, seed=1), 400.0))
    assert not np.array_equal(random, schedule(Load("poisson", 50, seed=2), 400.0))
    assert len(schedule(Load("fixed", 0.001), 1.0)) == 1


def test_no_rate_is_refused_and_none_given_is_four_fifths_of_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="rate: -1"):
        schedule(Load("fixed", -1), 1.0)
    monkeypatch.setattr("benchmarks.latency.open_loop.capacity", lambda call, seconds: 5000.0)
    row = answer_load(lambda: None, Load("fixed"), 0.01)
    assert row["rate"] == pytest.approx(4000)
    assert row["arrivals"] == "fixed"
    assert row["calls"] == 40
