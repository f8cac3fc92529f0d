from __future__ import annotations

import numpy as np
import pytest

from vpr.inference.timing import measure, measure_rounds, summarise


class Clock:
    """Clock that advances only by the cost of calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float) -> object:
        costs = iter(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += next(costs, seconds[-1])

        return run


def test_calls_are_warmed_up_and_interleaved() -> None:
    clock = Clock()
    slow_start = [0.5] * 7 + [0.01]
    times = measure({"a": clock.call("a", *slow_start), "b": clock.call("b", 0.02)}, 0.4, clock)
    assert times["a"].max() == pytest.approx(10)
    assert times["b"] == pytest.approx(20)
    assert len(times["a"]) == pytest.approx(40, abs=10)
    assert len(times["b"]) == pytest.approx(20, abs=10)
    changes = sum(x != y for x, y in zip(clock.order, clock.order[1:], strict=False))
    assert changes >= 20  # ten rounds of each


def test_warm_up_takes_ten_calls_and_a_quarter_second() -> None:
    for cost, calls in ((0.1, 10), (0.01, 26)):
        clock = Clock()
        measure_rounds({"a": clock.call("a", cost)}, 1e-9, clock)
        assert len(clock.order) == pytest.approx(calls + 20, abs=1)  # ten rounds: one call not timed, one timed


def test_first_call_of_a_round_is_not_timed() -> None:
    clock = Clock()
    last = ""

    def call(name: str) -> object:
        def run() -> None:
            nonlocal last
            clock.now += 0.01 if last == name else 0.05  # the caches of the other call
            last = name

        return run

    measurements = measure_rounds({"a": call("a"), "b": call("b")}, 0.5, clock)
    assert all(row.milliseconds == pytest.approx(10) for row in measurements.values())
    assert all(len(row.rounds) == 10 for row in measurements.values())


def test_unsteady_call_is_measured_and_marked() -> None:
    clock = Clock()
    ramp = [0.1 * 1.2**step for step in range(200)]  # each window of five is 2.5 times the one before
    calls = {"ramp": clock.call("ramp", *ramp), "even": clock.call("even", 0.1)}
    timed = measure_rounds(calls, 0.1, clock)
    assert not timed["ramp"].warmed_up
    assert timed["even"].warmed_up
    assert len(timed["ramp"].milliseconds) >= 10
    assert clock.order.index("even") == 60


def test_percentiles_equal_numpy() -> None:
    values = np.random.default_rng(0).gamma(2, 5, 999)
    summary = summarise(values)
    assert summary["p50"] == np.median(values)
    assert summary["p99"] == np.percentile(values, 99)
    assert summary["max"] == values.max()
    assert summary["calls"] == 999
