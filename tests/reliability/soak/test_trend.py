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
    """Return the interval that assumes independent samples."""
    (slope, _), covariance = np.polyfit(HOURS, values, 1, cov=True)
    return slope - 1.96 * covariance[0, 0] ** 0.5, slope + 1.96 * covariance[0, 0] ** 0.5


def share_covered(truth: float, intervals: list[tuple[float, float]]) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_slope_equals_least_squares() -> None:
    values = 700 + 3.5 * HOURS + noise(1, 0.5, seed=0)[0]
    trend = fit_trend(HOURS, values)
    assert trend.slope == pytest.approx(np.polyfit(HOURS, values, 1)[0], rel=1e-9)
    assert trend.interval[0] < 3.5 < trend.interval[1]
    exact = fit_trend(HOURS, 700 - 2 * HOURS)
    np.testing.assert_allclose([exact.slope, *exact.interval], -2, atol=1e-9)


@pytest.mark.parametrize(("slope", "memory"), [(0.0, 0.0), (0.0, 0.8), (12.0, 0.8)])
def test_interval_covers_95_percent(slope: float, memory: float) -> None:
    series = slope * HOURS + noise(800, memory, seed=1)
    coverage = share_covered(slope, [fit_trend(HOURS, values).interval for values in series])
    assert coverage == pytest.approx(0.95, abs=0.03)  # four standard errors of 800 trials
    independent = share_covered(slope, [textbook_interval(values) for values in series[:200]])
    assert (independent < 0.6) == (memory == 0.8)  # the reason for the interval


def test_leak_differs_from_noise() -> None:
    noises = noise(200, 0.8, seed=2)
    detections = [fit_trend(HOURS, 700 + 12 * HOURS + values).interval[0] > 0 for values in noises]
    assert np.mean(detections) == 1
    alarms = [fit_trend(HOURS, 700 + values).interval[0] > 0 for values in noises]
    assert np.mean(alarms) < 0.06


def test_too_few_samples_are_rejected() -> None:
    with pytest.raises(UserError, match="expected 32 samples or more, got 31"):
        fit_trend(HOURS[:31], HOURS[:31])
