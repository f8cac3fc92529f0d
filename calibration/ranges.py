"""Activation ranges for symmetric INT8, from a streaming histogram of magnitudes. Pure numpy."""

from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from calibration.config import Method
from vpr.inference.int8 import LEVELS

BINS = 2048
_BLOCK = 128  # thresholds per step, which bounds the memory of a search over all of them
_AVERAGING = 0.1
_SMOOTHING = 1e-4
_NEWTON_STEPS = 100
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass
class MagnitudeHistogram:
    """Streaming histogram of the magnitudes of one tensor, in constant memory.

    Counts of |x| are in equal bins from 0 to ``limit``. If a larger value arrives, neighbouring bins are merged until
    it fits, so no value is ever clipped.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))  # (2048,) int64
    limit: float = 0.0  # upper edge of the last bin; 0 before the first non-zero value
    largest: float = 0.0  # largest |x| seen
    average: float | None = None  # moving average of the largest |x| of each batch
    zeros: int = 0  # number of values that are 0

    def add(self, values: NDArray[np.float32]) -> None:
        """Add a batch of values of any shape; ValueError if a value is not finite."""
        magnitudes = np.abs(values, dtype=np.float64).ravel()
        batch_max = float(magnitudes.max(initial=0.0))
        if not np.isfinite(batch_max):
            raise ValueError("activation is not finite")
        self.largest = max(self.largest, batch_max)
        self.average = batch_max if self.average is None else self.average + _AVERAGING * (batch_max - self.average)
        self.zeros += int(np.count_nonzero(magnitudes == 0))
        if self.limit == 0.0:
            self.limit = batch_max
        if self.limit == 0.0:
            self.counts[0] += magnitudes.size
            return
        while batch_max > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.limit *= 2
        index = np.minimum((magnitudes * (BINS / self.limit)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    @property
    def edges(self) -> NDArray[np.float64]:
        """Upper edge of each bin, (2048,)."""
        return np.arange(1, BINS + 1, dtype=np.float64) * (self.limit / BINS)

    @property
    def centres(self) -> NDArray[np.float64]:
        """Middle of each bin, (2048,)."""
        return self.edges - 0.5 * self.limit / BINS


def threshold(histogram: MagnitudeHistogram, method: Method, percentile: float = 99.99) -> float:
    """Return the magnitude that maps to 127: positive, at most the largest value seen (1.0 for a tensor of zeros).

    ``minmax`` takes the largest value, ``moving-average`` the moving average of the batches' largest values, and
    ``percentile`` a percentile of |x|, in percent. ``entropy`` minimises the Kullback-Leibler divergence, ``mse`` the
    expected squared error. ``octav`` takes the fixed point of that error's derivative.
    """
    if histogram.largest == 0.0:
        return 1.0
    match method:
        case "minmax":
            limit = histogram.largest
        case "moving-average":
            limit = histogram.average or histogram.largest
        case "percentile":
            share = np.cumsum(histogram.counts) / histogram.counts.sum()
            limit = float(histogram.edges[int(np.searchsorted(share, percentile / 100))])
        case "entropy":
            limit = float(histogram.edges[np.argmin(divergence(histogram))])
        case "mse":
            limit = float(histogram.edges[np.argmin(expected_error(histogram))])
        case "octav":
            limit = clipping_fixed_point(histogram)
    return min(limit, histogram.largest)


def expected_error(histogram: MagnitudeHistogram) -> NDArray[np.float64]:
    """Compute the mean squared error of symmetric INT8 with each bin edge as threshold, (2048,) float64.

    Every value counts at the centre of its bin. Rounding is computed, not modelled as uniform noise: half of GELU's
    outputs are within one or two steps of zero, where that model is wrong by 10 %.
    """
    edges, centres = histogram.edges, histogram.centres
    weights = histogram.counts / histogram.counts.sum()
    errors = np.empty(BINS)
    for start in range(0, BINS, _BLOCK):
        scales = edges[start : start + _BLOCK, None] / LEVELS
        rounded = np.minimum(np.rint(centres / scales), LEVELS) * scales
        errors[start : start + _BLOCK] = ((centres - rounded) ** 2) @ weights
    return errors


def divergence(histogram: MagnitudeHistogram) -> NDArray[np.float64]:
    """Compute the KL divergence of the quantised distribution with each bin edge as threshold, (2048,) float64 nats.

    P is the histogram up to the threshold, with all larger values in its last bin. Q is the histogram in 128 levels;
    the count of each level is spread evenly over its non-empty bins (S. Migacz, "8-bit Inference with TensorRT",
    GTC 2017). As in MXNet, a bin that is empty in P or Q gets a count of 1e-4 there, taken from the other bins.
    The first bin gets the count of the second, as in NVIDIA's pytorch-quantization: zeros are exact at every scale, and
    the half of zeros that a ReLU leaves would outweigh all other bins.
    There is one level per magnitude of INT8, and 2,048 bins: with ONNX Runtime's default of 128 bins over both signs,
    every threshold would be the largest value. Fewer than 128 bins give infinity, as no level has more than one bin.
    """
    counts = histogram.counts.astype(np.float64)
    counts[0] = counts[1]
    beyond = counts.sum() - np.cumsum(counts)
    levels, divergences = LEVELS + 1, np.full(BINS, np.inf)
    for size in range(levels, BINS + 1):
        inside = counts[:size]
        reference = inside.copy()
        reference[-1] += beyond[size - 1]
        starts = -(-np.arange(levels) * size // levels)  # the first bin j with j * levels // size == level
        non_empty = np.add.reduceat((inside > 0).astype(np.float64), starts)
        mean = np.add.reduceat(inside, starts) / np.maximum(non_empty, 1)
        quantised = np.repeat(mean, np.diff(np.append(starts, size))) * (inside > 0)
        if quantised.any():
            p, q = _smooth(reference), _smooth(quantised)
            divergences[size - 1] = float(p @ np.log(p / q))
    return divergences


def clipping_fixed_point(histogram: MagnitudeHistogram) -> float:
    """Compute the threshold of least squared error by Newton's iteration (OCTAV), with uniform rounding noise.

    ``s <- sum(|x|; |x| > s) / (n(0 < |x| <= s) / (12 * 127^2) + n(|x| > s))`` (Sakr et al., "Optimal Clipping
    and Magnitude-aware Differentiation", ICML 2022, eq. 6, with the step of 127 levels per sign).
    """
    counts, centres = histogram.counts.astype(np.float64), histogram.centres
    inside = counts.copy()
    inside[0] = max(inside[0] - histogram.zeros, 0.0)
    s = float(centres @ inside / max(inside.sum(), 1.0))
    for _ in range(_NEWTON_STEPS):
        above = centres > s
        noise = inside[~above].sum() / (12.0 * LEVELS**2)
        updated = float(centres[above] @ counts[above] / (noise + counts[above].sum())) if above.any() else s
        if abs(updated - s) <= 1e-6 * s:
            break
        s = updated
    return s


def _smooth(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a distribution whose empty bins get a small count, taken evenly from the others."""
    empty = counts == 0
    share = _SMOOTHING * empty.sum() / max((~empty).sum(), 1)
    smoothed = np.maximum(np.where(empty, _SMOOTHING, counts - share), _SMOOTHING)
    return smoothed / smoothed.sum()
