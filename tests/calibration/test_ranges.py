from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.ranges import BINS, LEVELS, MagnitudeHistogram, expected_error, threshold


def _histogram(*batches: np.ndarray) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    for batch in batches:
        histogram.add(batch.astype(np.float32))
    return histogram


def _quantisation_error(values: np.ndarray, limit: float) -> float:
    """Squared error of symmetric INT8 itself, in float64."""
    scale = limit / LEVELS
    steps = np.clip(np.rint(values.astype(np.float64) / scale), -LEVELS, LEVELS)
    return float(np.mean((values - steps * scale) ** 2))


SHAPES = {
    "normal": lambda rng: rng.normal(size=200_000),
    "heavy tail": lambda rng: rng.standard_t(3, size=200_000),
    "gelu": lambda rng: F.gelu(torch.from_numpy(rng.normal(size=200_000))).numpy(),
    "one outlier": lambda rng: np.append(rng.normal(size=200_000), 300.0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_threshold_is_as_good_as_trying_them_all(shape: str) -> None:
    values = SHAPES[shape](np.random.default_rng(0))
    found = threshold(_histogram(values), "mse")
    best = min(_quantisation_error(values, t) for t in np.linspace(0.02, 1, 150) * np.abs(values).max())
    assert _quantisation_error(values, found) <= 1.02 * best
    assert _quantisation_error(values, found) <= 1.001 * _quantisation_error(values, np.abs(values).max())


def test_expected_error_follows_the_real_one() -> None:
    values = np.random.default_rng(1).standard_t(4, size=200_000).astype(np.float32)
    histogram = _histogram(values)
    expected = expected_error(histogram)
    for bin_ in range(BINS // 16, BINS, BINS // 7):
        real = _quantisation_error(values, float(histogram.edges[bin_]))
        assert expected[bin_] == pytest.approx(real, rel=0.06)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), min_size=1, max_size=6))
def test_streaming_loses_no_value_and_min_max_is_exact(batches: list[list[float]]) -> None:
    arrays = [np.array(batch, dtype=np.float32) for batch in batches]
    histogram = _histogram(*arrays)
    values = np.abs(np.concatenate(arrays).astype(np.float64))
    assert histogram.counts.sum() == len(values)
    assert threshold(histogram, "minmax") == (values.max() or 1.0)
    assert histogram.limit >= values.max()


def test_percentile_is_numpy_s_within_a_bin() -> None:
    values = np.abs(np.random.default_rng(2).normal(size=(10, 30_000)))
    histogram = _histogram(*values)
    found = threshold(histogram, "percentile", 99.9)
    assert found == pytest.approx(np.percentile(values, 99.9), abs=1.5 * histogram.limit / BINS)


def test_batches_and_one_array_give_the_same_counts() -> None:
    values = np.random.default_rng(3).normal(size=(4, 1000)).astype(np.float32)
    values[0, 0] = 50  # the largest first, so no bins are merged
    np.testing.assert_array_equal(_histogram(*values).counts, _histogram(values).counts)


def test_zeros_and_what_is_not_finite() -> None:
    assert threshold(_histogram(np.zeros(10)), "mse") == 1.0
    with pytest.raises(ValueError, match="not finite"):
        _histogram(np.array([1.0, np.inf]))
    with pytest.raises(ValueError, match="not finite"):
        _histogram(np.array([1.0, np.nan]))
