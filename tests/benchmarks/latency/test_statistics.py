from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from benchmarks.latency.statistics import instability_reason, quantile_interval, summarize_latency
from vpr.inference.timing import Measurement


def _inside(count: int, share: Fraction, low: int, high: int) -> Fraction:
    """Exact probability that the quantile is between the low-th and the high-th smallest of ``count`` values."""
    return sum((comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(low, high)), start=Fraction(0))


@pytest.mark.parametrize(("count", "share"), [(30, "1/2"), (60, "9/10"), (400, "99/100"), (11, "1/2")])
def test_order_statistics_are_the_tightest_interval(count: int, share: str) -> None:
    exact = Fraction(share)
    low, high = quantile_interval(np.arange(1.0, count + 1), float(exact))
    assert low is not None
    assert high is not None
    outside = Fraction(1, 40)
    for rank in (int(low), int(low) + 1):  # below the low-th, and one further
        assert (1 - _inside(count, exact, rank, count + 1) <= outside) == (rank == int(low))
    for rank in (int(high), int(high) - 1):
        assert (1 - _inside(count, exact, 0, rank) <= outside) == (rank == int(high))


def test_too_few_values_bound_no_tail() -> None:
    assert quantile_interval(np.arange(367.0), 0.99)[1] is None
    assert quantile_interval(np.arange(368.0), 0.99)[1] == 367
    assert quantile_interval(np.array([1.0, 2.0]), 0.5) == (None, None)


def test_interval_of_many_values_is_nearly_normal() -> None:
    low, high = quantile_interval(np.arange(200_000.0), 0.5)
    # The normal approximation: 1.96 standard deviations of sqrt(n)/2.
    assert low == pytest.approx(100_000 - 1.96 * np.sqrt(200_000) / 2, abs=2)
    assert high == pytest.approx(100_000 + 1.96 * np.sqrt(200_000) / 2, abs=2)


def test_interval_covers_the_true_quantile() -> None:
    rng = np.random.default_rng(0)
    draws = np.sort(rng.exponential(size=(2000, 500)), axis=1)
    for share in (0.5, 0.9, 0.99):
        truth = -np.log(1 - share)
        ends = [quantile_interval(draw, share) for draw in draws]
        held = np.mean([low <= truth <= high for low, high in ends])
        assert 0.94 <= held <= 0.985


def _measurement(medians: list[float], warmed_up: bool = True) -> Measurement:
    return Measurement(tuple(np.full(9, median) for median in medians), warmed_up)


def test_steady_measurement_is_stable() -> None:
    assert instability_reason(_measurement([10, 10.2, 9.9, 10, 10.1, 10, 10.3, 9.8, 10, 10.1])) is None
    assert summarize_latency(_measurement([10.0] * 10)).unstable is None


def test_unsteady_measurement_has_its_reason() -> None:
    assert instability_reason(_measurement([10.0] * 5 + [10.6] * 5)) == "second half +6% against the first"
    assert instability_reason(_measurement([10.0] * 5 + [10.4] * 5)) is None
    reason = instability_reason(_measurement([10.0] * 9 + [12.0]))
    assert reason == "medians of the rounds +0% to +20% around their median; p50 known to 4.0% only"
    assert instability_reason(_measurement([9.4, 10.6, 10.0, 10.6, 9.4] * 2)) == "p50 known to 3.6% only"
    assert instability_reason(_measurement([10.0] * 10, warmed_up=False)) == "warm-up did not become steady"


def test_latency_has_quantiles_and_their_intervals() -> None:
    rng = np.random.default_rng(1)
    measurement = Measurement(tuple(rng.gamma(20, 0.5, 50) for _ in range(10)), True)
    latency = summarize_latency(measurement)
    values = measurement.milliseconds
    assert latency.p90 == np.percentile(values, 90)
    assert latency.max == values.max()
    for name in ("p50", "p90", "p99"):
        low, high = latency.ci95[name]
        assert low < getattr(latency, name) < high
        assert {low, high} <= set(values.tolist())
