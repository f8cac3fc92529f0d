"""Activation ranges for symmetric INT8, from a streaming histogram of magnitudes. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vpr.int8 import LEVELS

BINS = 2048
_BLOCK = 128  # thresholds tried at a time: bounds the memory of a search over all of them
Method = Literal["minmax", "percentile", "mse"]


@dataclass
class MagnitudeHistogram:
    """Counts of |x| in equal bins from 0 to ``limit``; memory does not grow with the data.

    When a larger value comes, neighbouring bins are merged until it fits, so no value is ever clipped.

    Attributes:
        counts: (2048,) int64.
        limit: upper edge of the last bin; 0 before any non-zero value.
        largest: largest |x| seen.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    limit: float = 0.0
    largest: float = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count values of any shape.

        Raises:
            ValueError: a value is not finite.
        """
        magnitudes = np.abs(values, dtype=np.float64).ravel()
        top = float(magnitudes.max(initial=0.0))
        if not np.isfinite(top):
            raise ValueError("activation is not finite")
        self.largest = max(self.largest, top)
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


def threshold(histogram: MagnitudeHistogram, method: Method, percentile: float = 99.99) -> float:
    """The magnitude that maps to 127.

    Args:
        histogram: of one tensor.
        method: ``minmax`` takes the largest value seen, ``percentile`` that of |x|, ``mse`` the one of
            least expected squared error.
        percentile: in percent, for ``percentile``.

    Returns:
        a positive number, never above the largest value seen (1.0 for a tensor of zeros).
    """
    if histogram.largest == 0.0:
        return 1.0
    if method == "minmax":
        return histogram.largest
    if method == "percentile":
        share = np.cumsum(histogram.counts) / histogram.counts.sum()
        found = float(histogram.edges[int(np.searchsorted(share, percentile / 100))])
        return min(found, histogram.largest)
    return min(float(histogram.edges[int(np.argmin(expected_error(histogram)))]), histogram.largest)


def expected_error(histogram: MagnitudeHistogram) -> NDArray[np.float64]:
    """Squared error of symmetric INT8 for every bin edge taken as threshold, every bin at its centre.

    Rounding is computed, not modelled as uniform noise: half of GELU's outputs lie within a step or
    two of zero, where that model is off by a tenth.

    Returns:
        (2048,) float64, a mean over values.
    """
    edges = histogram.edges
    centres = edges - 0.5 * histogram.limit / BINS
    weights = histogram.counts / histogram.counts.sum()
    errors = np.empty(BINS)
    for start in range(0, BINS, _BLOCK):
        scales = edges[start : start + _BLOCK, None] / LEVELS
        rounded = np.minimum(np.rint(centres / scales), LEVELS) * scales
        errors[start : start + _BLOCK] = ((centres - rounded) ** 2) @ weights
    return errors
