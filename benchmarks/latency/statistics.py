"""Confidence of measured latencies: intervals of their quantiles, and a check that the machine was steady."""

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.schema import Latency
from vpr.inference.timing import Measurement, summarise

_QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
_LEVEL = 0.95
# Limits of a steady measurement, as shares: difference between the medians of its halves, distance of a round's median
# from the median of all rounds, and twice the standard error of the rounds' medians. At the last limit two measurements
# differ by more than 3.5 % one time in twenty.
MAX_HALVES, MAX_ROUND, MAX_ERROR = 0.05, 0.15, 0.025

QuantileInterval = tuple[float | None, float | None]


def summarize_latency(measurement: Measurement) -> Latency:
    """Return the quantiles of a measurement, their intervals, and the reason if it is unstable."""
    ordered = np.sort(measurement.milliseconds)
    intervals = {name: quantile_interval(ordered, share) for name, share in _QUANTILES.items()}
    quantiles = summarise(ordered)
    return Latency(**quantiles, ci95=intervals, unstable=instability_reason(measurement))


def quantile_interval(ordered: NDArray[np.float64], share: float, level: float = _LEVEL) -> QuantileInterval:
    """Return the interval of a quantile, such as 0.99, between two of n ascending values, for any distribution.

    The number of values below the quantile is binomial, so the k-th smallest bounds it from below with the
    probability that this number is at least k (David and Nagaraja, "Order Statistics", 2003, section 7.1). It holds
    for independent calls; :func:`instability_reason` looks for drift between rounds. Each side leaves out half of what
    ``level``, the confidence, leaves. An end is None where n is too small (p99 needs 368 values from above).
    """
    count = len(ordered)
    outside = (1 - level) / 2
    below = np.cumsum(_binomial(count, share))  # at k: probability that at most k values are below the quantile
    low = int(np.searchsorted(below, outside, side="right"))  # the largest k whose below[k - 1] is at most outside
    high = int(np.searchsorted(below, 1 - outside, side="left")) + 1  # the smallest k whose below[k - 1] reaches it
    return (float(ordered[low - 1]) if low else None, float(ordered[high - 1]) if high <= count else None)


def instability_reason(measurement: Measurement) -> str | None:
    """Return the reason not to rely on a measurement, or None if it is steady.

    A measurement is unstable if its warm-up ended at 60 calls without being steady, if the medians of its first and
    second five rounds differ by more than 5 %, if the median of any round is more than 15 % from the median of all
    rounds, or if the standard error of the rounds' medians gives the p50 to no better than 2.5 %.
    """
    rounds = measurement.rounds
    medians = np.array([np.median(times) for times in rounds])
    half = len(medians) // 2
    first, second = (float(np.median(np.concatenate(part))) for part in (rounds[:half], rounds[half:]))
    centre = float(np.median(medians))
    reasons = []
    if not measurement.warmed_up:
        reasons.append("warm-up did not become steady")
    if abs(second - first) > MAX_HALVES * first:
        reasons.append(f"second half {second / first - 1:+.0%} against the first")
    if np.abs(medians - centre).max() > MAX_ROUND * centre:
        low, high = medians.min() / centre - 1, medians.max() / centre - 1
        reasons.append(f"medians of the rounds {low:+.0%} to {high:+.0%} around their median")
    error = 2 * float(medians.std(ddof=1)) / len(medians) ** 0.5 / centre
    if error > MAX_ERROR:
        reasons.append(f"p50 known to {error:.1%} only")
    return "; ".join(reasons) or None


def _binomial(count: int, share: float) -> NDArray[np.float64]:
    """Return the probabilities of 0 to ``count`` successes, by logarithms: large binomials exceed float64."""
    number = np.arange(1, count + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((count - number + 1) / number))])
    hits = np.arange(count + 1)
    return np.exp(ways + hits * np.log(share) + (count - hits) * np.log1p(-share))
