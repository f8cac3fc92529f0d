from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.config import Method
from calibration.ranges import BINS, LEVELS, METHODS, MagnitudeHistogram, divergence, expected_error, threshold


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
def test_mse_threshold_matches_exhaustive_search(shape: str) -> None:
    values = SHAPES[shape](np.random.default_rng(0))
    limit = threshold(_histogram(values), "mse")
    best = min(_quantisation_error(values, t) for t in np.linspace(0.02, 1, 150) * np.abs(values).max())
    assert _quantisation_error(values, limit) <= 1.02 * best
    assert _quantisation_error(values, limit) <= 1.001 * _quantisation_error(values, np.abs(values).max())


def test_expected_error_matches_the_real_error() -> None:
    values = np.random.default_rng(1).standard_t(4, size=200_000).astype(np.float32)
    histogram = _histogram(values)
    expected = expected_error(histogram)
    for bin_ in range(BINS // 16, BINS, BINS // 7):
        real = _quantisation_error(values, float(histogram.edges[bin_]))
        assert expected[bin_] == pytest.approx(real, rel=0.06)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), min_size=1, max_size=6))
def test_streaming_keeps_counts_and_maximum(batches: list[list[float]]) -> None:
    arrays = [np.array(batch, dtype=np.float32) for batch in batches]
    histogram = _histogram(*arrays)
    values = np.abs(np.concatenate(arrays).astype(np.float64))
    assert histogram.counts.sum() == len(values)
    assert threshold(histogram, "minmax") == (values.max() or 1.0)
    assert histogram.limit >= values.max()


def test_percentile_equals_numpy_within_a_bin() -> None:
    values = np.abs(np.random.default_rng(2).normal(size=(10, 30_000)))
    histogram = _histogram(*values)
    limit = threshold(histogram, "percentile", 99.9)
    assert limit == pytest.approx(np.percentile(values, 99.9), abs=1.5 * histogram.limit / BINS)


def test_batching_does_not_change_counts() -> None:
    values = np.random.default_rng(3).normal(size=(4, 1000)).astype(np.float32)
    values[0, 0] = 50  # the largest value first, so that no bins are merged
    np.testing.assert_array_equal(_histogram(*values).counts, _histogram(values).counts)


def test_zeros_give_one_and_non_finite_raises() -> None:
    assert threshold(_histogram(np.zeros(10)), "mse") == 1.0
    with pytest.raises(ValueError, match="not finite"):
        _histogram(np.array([1.0, np.inf]))
    with pytest.raises(ValueError, match="not finite"):
        _histogram(np.array([1.0, np.nan]))


def _naive_divergence(counts: list[int], size: int) -> float:
    """Migacz's algorithm with MXNet's smoothing and pytorch-quantization's first bin, bin by bin."""
    counts = [counts[1], *counts[1:]]
    p = [float(c) for c in counts[:size]]
    q = [0.0] * size
    for level in range(128):
        bins = [j for j in range(size) if j * 128 // size == level]
        non_empty = [j for j in bins if counts[j]]
        for j in non_empty:
            q[j] = sum(counts[i] for i in bins) / len(non_empty)
    p[-1] += sum(counts[size:])

    def smoothed(values: list[float]) -> list[float]:
        empty = sum(v == 0 for v in values)
        share = 1e-4 * empty / max(len(values) - empty, 1)
        values = [max(v - share, 1e-4) if v else 1e-4 for v in values]
        return [v / sum(values) for v in values]

    return sum(a * np.log(a / b) for a, b in zip(smoothed(p), smoothed(q), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_divergence_equals_naive_loop(shape: str) -> None:
    histogram = _histogram(SHAPES[shape](np.random.default_rng(4))[:5000])
    divergences, counts = divergence(histogram), histogram.counts.tolist()
    assert np.isinf(divergences[:127]).all()
    for size in (128, 129, 200, 1000, 1791, 2047, 2048):
        assert divergences[size - 1] == pytest.approx(_naive_divergence(counts, size), rel=1e-9)


def test_entropy_clips_tail_that_onnxruntime_keeps() -> None:
    """With its 128 bins, ONNX Runtime's entropy method always returns the largest value."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    values = np.random.default_rng(5).standard_t(3, size=200_000).astype(np.float32)
    collector = HistogramCollector("entropy", False, 128, 128, 99.999, "same")
    collector.collect({"x": [values]})
    low, high = (float(v) for v in collector.compute_collection_result()["x"][:2])
    assert (low, high) == (values.min(), values.max())
    assert threshold(_histogram(values), "entropy") < 0.6 * max(-low, high)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
def test_percentile_and_minmax_equal_onnxruntime(percentile: float) -> None:
    from onnxruntime.quantization.calibrate import HistogramCollector

    values = np.random.default_rng(6).normal(size=300_000).astype(np.float32)
    collector = HistogramCollector("percentile", True, BINS, 128, percentile, "same")
    collector.collect({"x": [values]})
    low, high = (float(v) for v in collector.compute_collection_result()["x"][:2])
    histogram = _histogram(values)
    width = 2 * histogram.limit / BINS  # ONNX Runtime spreads as many bins over both signs
    assert -low == pytest.approx(high)
    assert threshold(histogram, "percentile", percentile) == pytest.approx(high, abs=1.5 * width)
    assert threshold(histogram, "minmax") == np.abs(values).max()


def test_moving_average_equals_pytorch_observer() -> None:
    from torch.ao.quantization import MovingAverageMinMaxObserver

    batches = np.abs(np.random.default_rng(7).standard_t(3, size=(12, 5000))).astype(np.float32)
    observer = MovingAverageMinMaxObserver(averaging_constant=0.1)
    for batch in batches:
        observer(torch.from_numpy(batch))
    assert threshold(_histogram(*batches), "moving-average") == pytest.approx(float(observer.max_val), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_octav_minimises_its_error_model(shape: str) -> None:
    values = np.abs(SHAPES[shape](np.random.default_rng(8)).astype(np.float64))

    def error(s: float) -> float:
        noise = s**2 / (12 * 127**2) * np.mean((values > 0) & (values <= s))
        return float(noise + np.mean(np.maximum(values - s, 0) ** 2))

    limit = threshold(_histogram(values), "octav")
    best = min(error(s) for s in np.linspace(0.01, 1, 400) * values.max())
    assert error(limit) <= 1.01 * best


ONE_SIDED = {
    "relu of normal": lambda rng: np.maximum(rng.normal(size=200_000), 0),
    "relu of a mixture": lambda rng: np.maximum(rng.normal(size=200_000) * rng.choice([0.5, 2.0], 200_000), 0),
    "half-normal": lambda rng: np.abs(rng.normal(size=200_000)),
    "nine tenths of zeros": lambda rng: np.abs(rng.normal(size=200_000)) * (rng.random(200_000) < 0.1),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ONE_SIDED)
def test_every_method_keeps_one_sided_values(shape: str, method: Method) -> None:
    """Zeros are exact at every scale, so the half that a ReLU leaves must not attract the threshold."""
    values = ONE_SIDED[shape](np.random.default_rng(9)).astype(np.float64)
    limit = threshold(_histogram(values), method)
    quantised = np.clip(np.rint(values * (LEVELS / limit)), 0, LEVELS) * (limit / LEVELS)
    cosine = values @ quantised / np.sqrt((values @ values) * (quantised @ quantised))
    assert 1 - cosine <= 5e-4
    assert limit >= 0.5 * np.quantile(values[values > 0], 0.999)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200))
def test_thresholds_are_positive_and_within_maximum(values: list[float]) -> None:
    histogram = _histogram(np.array(values, dtype=np.float32))
    for method in METHODS:
        assert 0 < threshold(histogram, method) <= (histogram.largest or 1.0)
