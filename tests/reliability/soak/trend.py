"""The slope of a series of samples, with an interval that their autocorrelation does not make too narrow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError

_WAVES = 8
_T_QUANTILE = 2.306004  # 97.5 % of Student's t with as many degrees of freedom as there are waves


@dataclass(frozen=True)
class Trend:
    """A straight line through samples.

    Attributes:
        slope: rise per unit of time.
        interval: its 95 % interval.
    """

    slope: float
    interval: tuple[float, float]


def fit_trend(times: NDArray[np.float64], values: NDArray[np.float64]) -> Trend:
    """Least squares, and an interval by the series estimator of the long-run variance.

    What autocorrelated noise does to a slope depends on its power at the lowest frequencies alone. That is taken from
    the residuals' projections on 8 cosines made orthogonal to the line: the slope over its error then has Student's t
    distribution of 8 degrees of freedom (Sun, "Robust trend inference with series variance estimator and
    testing-optimal smoothing parameter", Journal of Econometrics 164, 2011). The number is fixed and small, the
    cautious side. The interval holds the truth in 95 % of cases where noise forgets itself within a fiftieth of the
    series, in 88 % within a fifteenth; of a random walk it is too narrow, so that one may be taken for growth.

    Args:
        times: (n,) increasing and about evenly spaced, n at least 32.
        values: (n,) at those times.

    Raises:
        UserError: too few samples.
    """
    count = len(times)
    if count < 4 * _WAVES:
        raise UserError(f"trend: {count} samples: it needs {4 * _WAVES}: measure longer")
    centred = times - times.mean()
    spread = float(centred @ centred)
    slope = float(centred @ values) / spread
    residuals = values - values.mean() - slope * centred
    steps = (np.arange(count) + 0.5) / count
    waves = [np.cos(np.pi * wave * steps) for wave in range(1, _WAVES + 1)]
    basis = np.linalg.qr(np.stack([np.ones(count), centred, *waves], axis=1))[0][:, 2:]
    error = float(np.sqrt(np.mean((basis.T @ residuals) ** 2) / spread))
    return Trend(slope, (slope - _T_QUANTILE * error, slope + _T_QUANTILE * error))
