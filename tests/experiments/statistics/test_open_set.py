from __future__ import annotations

import numpy as np
import pytest

from experiments.statistics.open_set import measure_coverage


def test_bound_covers_in_a_finite_population() -> None:
    """80 products of unequal numbers of queries; a limit of .02 needs more products than these."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, 80)
    products = np.repeat(np.arange(80), sizes).astype(np.str_)
    scores = np.repeat(rng.normal(size=80), sizes) + 0.5 * rng.normal(size=sizes.sum())
    present = rng.normal(3, 1, 400), np.arange(400).astype(np.str_)
    result = measure_coverage(scores, products, *present, 0.1, 0.95, 150, rng)
    assert result.confirmed == 1.0
    assert result.broken <= 0.05
    assert 0.005 < result.true_rate < 0.1
    assert 0 <= result.held_out_rate < 0.1
    # P(N(3, 1) < t) for thresholds t that a tenth of N(0, 1.25) exceeds at most.
    assert 0.01 < result.false_reject < 0.5
    assert result.products == 80
    few = measure_coverage(scores, products, *present, 0.02, 0.95, 5, rng)
    assert (few.confirmed, few.broken) == (0.0, 0.0)
    assert np.isnan(few.true_rate)


def test_population_that_is_always_answered_breaks_no_bound() -> None:
    """Equal scores: the only confirmed threshold is above them all."""
    products = np.arange(60).astype(np.str_)
    result = measure_coverage(np.ones(60), products, np.ones(60), products, 0.1, 0.95, 5, np.random.default_rng(0))
    assert (result.broken, result.true_rate) == (0.0, pytest.approx(0.0))
    assert result.false_reject == pytest.approx(1.0)
