"""How well milliseconds are known: intervals of their quantiles, and whether the run was steady."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr.inference.timing import Measurement, summarise

_QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
_LEVEL = 0.95
# A row is unstable beyond these, in parts of one: the medians of its two halves, a round's median against all rounds',
# and twice the standard error of the rounds' medians (two runs then differ by more than 3.5 % one time in twenty).
HALVES, ROUND, ERROR = 0.05, 0.15, 0.025

Interval = tuple[float | None, float | None]


def summarize_latency(timed: Measurement) -> dict[str, Any]:
    """A row's numbers: p50, p90, p99, max, calls, ``ci95`` of the quantiles, and ``unstable``: None or the reason."""
    ordered = np.sort(timed.milliseconds)
    intervals = {name: list(quantile_interval(ordered, share)) for name, share in _QUANTILES.items()}
    return {**summarise(ordered), "ci95": intervals, "unstable": instability_reason(timed)}


def quantile_interval(ordered: NDArray[np.float64], share: float, level: float = _LEVEL) -> Interval:
    """Interval of a quantile between two order statistics; no shape of the distribution is assumed.

    The number of values below the quantile is binomial, so the k-th smallest bounds it from below with the
    probability that this number is at least k (David and Nagaraja, "Order Statistics", 2003, section 7.1). It holds
    for independent calls; drift between rounds is what :func:`instability_reason` looks for.

    Args:
        ordered: n values, ascending.
        share: of the quantile, such as 0.99.
        level: of the interval; half of the rest is left out on each side.

    Returns:
        lower and upper end; None where n is too small for any value to bound it (p99 needs 368 from above).
    """
    count = len(ordered)
    outside = (1 - level) / 2
    below = np.cumsum(_binomial(count, share))  # at k: probability that at most k values lie below the quantile
    low = int(np.searchsorted(below, outside, side="right"))  # the largest k whose below[k - 1] is at most outside
    high = int(np.searchsorted(below, 1 - outside, side="left")) + 1  # the smallest k whose below[k - 1] reaches it
    return (float(ordered[low - 1]) if low else None, float(ordered[high - 1]) if high <= count else None)


def instability_reason(timed: Measurement) -> str | None:
    """Why a row is not to be relied on, or None.

    It is unstable if its warm-up ended at 60 calls without being steady, if the medians of its first and second five
    rounds differ by more than 5 %, if the median of any round lies more than 15 % from the median of all rounds', or
    if the rounds' medians are so far apart that they tell the p50 to no better than 2.5 %.
    """
    medians = np.array([np.median(one) for one in timed.rounds])
    half = len(medians) // 2
    first, second = (float(np.median(np.concatenate(part))) for part in (timed.rounds[:half], timed.rounds[half:]))
    centre = float(np.median(medians))
    reasons = []
    if not timed.warmed_up:
        reasons.append("warm-up did not become steady")
    if abs(second - first) > HALVES * first:
        reasons.append(f"second half {second / first - 1:+.0%} against the first")
    if np.abs(medians - centre).max() > ROUND * centre:
        least, most = medians.min() / centre - 1, medians.max() / centre - 1
        reasons.append(f"rounds' medians {least:+.0%} to {most:+.0%} around theirs")
    error = 2 * float(medians.std(ddof=1)) / len(medians) ** 0.5 / centre
    if error > ERROR:
        reasons.append(f"rounds' medians tell the p50 to {error:.1%} only")
    return "; ".join(reasons) or None


def _binomial(count: int, share: float) -> NDArray[np.float64]:
    """Probabilities of 0 to ``count`` successes, by logarithms: the binomials of 100,000 are beyond float64."""
    number = np.arange(1, count + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((count - number + 1) / number))])
    hits = np.arange(count + 1)
    return np.exp(ways + hits * np.log(share) + (count - hits) * np.log1p(-share))
