"""Activation ranges for symmetric INT8, from a streaming histogram of magnitudes. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from calibration.config import Method
from vpr.inference.int8 import LEVELS

BINS = 2048
_BLOCK = 128  # thresholds tried at a time: bounds the memory of a search over all of them
_AVERAGING = 0.1
_SMOOTHING = 1e-4
_NEWTON_STEPS = 100
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass
class MagnitudeHistogram:
    """What every method needs of one tensor, in one pass and in memory that does not grow with the data.

    Counts of |x| lie in equal bins from 0 to ``limit``. When a larger value comes, neighbouring bins are
    merged until it fits, so no value is ever clipped.

    Attributes:
        counts: (2048,) int64.
        limit: upper edge of the last bin; 0 before any non-zero value.
        largest: largest |x| seen.
        average: moving average of the largest |x| of each batch.
        zeros: number of values that are 0.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    limit: float = 0.0
    largest: float = 0.0
    average: float | None = None
    zeros: int = 0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count a batch of values of any shape.

        Raises:
            ValueError: a value is not finite.
        """
        magnitudes = np.abs(values, dtype=np.float64).ravel()
        top = float(magnitudes.max(initial=0.0))
        if not np.isfinite(top):
            raise ValueError("activation is not finite")
        self.largest = max(self.largest, top)
        self.average = top if self.average is None else self.average + _AVERAGING * (top - self.average)
        self.zeros += int(np.count_nonzero(magnitudes == 0))
        if self.limit == 0.0:
            self.limit = top
        if self.limit == 0.0:
            self.counts[0] += magnitudes.size
            return
        while top > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.limit *= 2
        index = np.minimum((magnitudes * (BINS / self.limit)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    @property
    def edges(self) -> NDArray[np.float64]:
        """(2048,) upper edge of each bin."""
        return np.arange(1, BINS + 1, dtype=np.float64) * (self.limit / BINS)

    @property
    def centres(self) -> NDArray[np.float64]:
        """(2048,) middle of each bin."""
        return self.edges - 0.5 * self.limit / BINS


def threshold(histogram: MagnitudeHistogram, method: Method, percentile: float = 99.99) -> float:
    """The magnitude that maps to 127.

    Args:
        histogram: of one tensor.
        method: ``minmax`` takes the largest value seen, ``moving-average`` that of the batches,
            ``percentile`` that of |x|, ``entropy`` the one of least Kullback-Leibler divergence, ``mse`` the
            one of least expected squared error, ``octav`` the fixed point of that error's derivative.
        percentile: in percent, for ``percentile``.

    Returns:
        a positive number, never above the largest value seen (1.0 for a tensor of zeros).
    """
    if histogram.largest == 0.0:
        return 1.0
    match method:
        case "minmax":
            found = histogram.largest
        case "moving-average":
            found = histogram.average or histogram.largest
        case "percentile":
            share = np.cumsum(histogram.counts) / histogram.counts.sum()
            found = float(histogram.edges[int(np.searchsorted(share, percentile / 100))])
        case "entropy":
            found = _least(histogram, divergence(histogram))
        case "mse":
            found = _least(histogram, expected_error(histogram))
        case "octav":
            found = clipping_fixed_point(histogram)
    return min(found, histogram.largest)


def expected_error(histogram: MagnitudeHistogram) -> NDArray[np.float64]:
    """Squared error of symmetric INT8 for every bin edge taken as threshold, every bin at its centre.

    Rounding is computed, not modelled as uniform noise: half of GELU's outputs lie within a step or
    two of zero, where that model is off by a tenth.

    Returns:
        (2048,) float64, a mean over values.
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
    """KL divergence of the distribution from its quantised self, for every bin edge taken as threshold.

    P is the histogram up to the threshold, what lies beyond added to its last bin; Q is the histogram in
    128 levels, each level's count spread evenly over its bins that hold anything (S. Migacz, "8-bit
    Inference with TensorRT", GTC 2017). As in MXNet, bins that only one of the two has get a count of 1e-4,
    taken from the others. There is one level for each magnitude of INT8, and 2,048 bins: with the 128 bins
    over both signs of ONNX Runtime's default every threshold is the largest value.

    Returns:
        (2048,) float64 nats; infinite below 128 bins, which hold no more than a level each.
    """
    counts = histogram.counts.astype(np.float64)
    beyond = counts.sum() - np.cumsum(counts)
    levels, found = LEVELS + 1, np.full(BINS, np.inf)
    for size in range(levels, BINS + 1):
        inside = counts[:size]
        reference = inside.copy()
        reference[-1] += beyond[size - 1]
        starts = -(-np.arange(levels) * size // levels)  # the first bin j with j * levels // size == level
        held = np.add.reduceat((inside > 0).astype(np.float64), starts)
        mean = np.add.reduceat(inside, starts) / np.maximum(held, 1)
        quantised = np.repeat(mean, np.diff(np.append(starts, size))) * (inside > 0)
        if quantised.any():
            found[size - 1] = _kullback_leibler(_smooth(reference), _smooth(quantised))
    return found


def clipping_fixed_point(histogram: MagnitudeHistogram) -> float:
    """OCTAV: Newton's iteration for the clipping of least squared error, rounding modelled as uniform noise.

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
        after = float(centres[above] @ counts[above] / (noise + counts[above].sum())) if above.any() else s
        if abs(after - s) <= 1e-6 * s:
            break
        s = after
    return s


def _least(histogram: MagnitudeHistogram, cost: NDArray[np.float64]) -> float:
    return float(histogram.edges[int(np.argmin(cost))])


def _smooth(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """A distribution whose empty bins hold a little, taken evenly from the others."""
    empty = counts == 0
    share = _SMOOTHING * empty.sum() / max((~empty).sum(), 1)
    smoothed = np.where(empty, _SMOOTHING, counts - share)
    smoothed = np.maximum(smoothed, _SMOOTHING)
    return smoothed / smoothed.sum()


def _kullback_leibler(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    return float(p @ np.log(p / q))
