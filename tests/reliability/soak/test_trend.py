from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.reliability.soak.trend import fit_trend
from vpr.common.errors import UserError

HOURS = np.linspace(0, 2, 400)


def noise(series: int, memory: float, seed: int) -> NDArray[np.float64]:
    """(series, 400) of a first-order autoregression of unit shocks, long settled."""
    shocks = np.random.default_rng(seed).normal(size=(series, len(HOURS) + 500))
    values = np.zeros_like(shocks)
    for step in range(1, shocks.shape[1]):
        values[:, step] = memory * values[:, step - 1] + shocks[:, step]
    return values[:, 500:]


def textbook_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """What takes each sample for independent."""
    (slope, _), covariance = np.polyfit(HOURS, values, 1, cov=True)
    return slope - 1.96 * covariance[0, 0] ** 0.5, slope + 1.96 * covariance[0, 0] ** 0.5


def share_that_holds(truth: float, intervals: list[tuple[float, float]]) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_a_line_is_found_as_least_squares_finds_it() -> None:
    values = 700 + 3.5 * HOURS + noise(1, 0.5, seed=0)[0]
    trend = fit_trend(HOURS, values)
    assert trend.slope == pytest.approx(np.polyfit(HOURS, values, 1)[0], rel=1e-9)
    assert trend.interval[0] < 3.5 < trend.interval[1]
    exact = fit_trend(HOURS, 700 - 2 * HOURS)
    np.testing.assert_allclose([exact.slope, *exact.interval], -2, atol=1e-9)


@pytest.mark.parametrize(("slope", "memory"), [(0.0, 0.0), (0.0, 0.8), (12.0, 0.8)])
def test_intervals_hold_the_truth_95_times_in_100_whatever_the_autocorrelation(slope: float, memory: float) -> None:
    series = slope * HOURS + noise(800, memory, seed=1)
    held = share_that_holds(slope, [fit_trend(HOURS, values).interval for values in series])
    assert held == pytest.approx(0.95, abs=0.03)  # four standard errors of 800 trials
    independent = share_that_holds(slope, [textbook_interval(values) for values in series[:200]])
    assert (independent < 0.6) == (memory == 0.8)  # what the interval is for


def test_a_leak_is_told_from_noise() -> None:
    noises = noise(200, 0.8, seed=2)
    found = [fit_trend(HOURS, 700 + 12 * HOURS + values).interval[0] > 0 for values in noises]
    assert np.mean(found) == 1
    alarms = [fit_trend(HOURS, 700 + values).interval[0] > 0 for values in noises]
    assert np.mean(alarms) < 0.06


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(UserError, match="31 samples: it needs 32"):
        fit_trend(HOURS[:31], HOURS[:31])
