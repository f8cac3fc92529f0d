"""Intervals of means over queries. The product is the independent unit: queries of a product are correlated."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, stdtrit

Ids = NDArray[np.str_]
Values = NDArray[np.bool_] | NDArray[np.float64]
Interval = tuple[float, float]

# Fewer products give no interval: a bootstrap of so few units is too narrow, whatever its form.
MIN_PRODUCTS = 10
# With fewer products that differ, resampling often draws none of them, and the interval is an exact bound instead.
MIN_VARYING = 10
TOO_FEW = f"no interval: fewer than {MIN_PRODUCTS} products"
_RESAMPLES = 2000
_FLIPS = 9999
_BLOCK = 1 << 22  # products drawn at once, which bounds the memory


@dataclass(frozen=True)
class ProductSums:
    """Values of queries, summed by product."""

    sums: NDArray[np.float64]  # (products,) sum of the values of each product's queries
    squares: NDArray[np.float64]  # (products,) sum of the squared values
    sizes: NDArray[np.float64]  # (products,) number of queries of each product

    @property
    def queries(self) -> float:
        """Number of queries."""
        return float(self.sizes.sum())

    @property
    def mean(self) -> float:
        """Mean over the queries."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def varying(self) -> int:
        """Number of products whose mean differs from that of the median product."""
        means = self.sums / self.sizes
        return int((np.abs(means - np.median(means)) > 1e-12).sum())


def sum_by_product(values: Values, products: Ids) -> ProductSums:
    """Sum (n,) values by their (n,) product ids."""
    _, codes = np.unique(products, return_inverse=True)
    floats = np.asarray(values, dtype=np.float64)
    sums, squares, sizes = (np.bincount(codes, weights) for weights in (floats, floats**2, np.ones_like(floats)))
    return ProductSums(np.asarray(sums), np.asarray(squares), np.asarray(sizes))


def mean_interval(
    values: Values,
    products: Ids,
    confidence: float = 0.95,
    seed: int = 0,
    lowest: float = 0.0,
    correlation: float = 1.0,
) -> Interval | None:
    """Return the two-sided interval of the mean of (n,) values, one per query; None with fewer than 10 products.

    The bootstrap resamples products with all their queries (Field and Welsh, "Bootstrapping clustered data", JRSS B
    2007). Its percentiles are widened as Student's t is for so many products (Hesterberg, "What Teachers Should Know
    About the Bootstrap", The American Statistician 2015, section 3.5).

    Where fewer than 10 products differ from the median product, the ends are Clopper-Pearson bounds (Biometrika 1934)
    on the deviations in each direction (Bonferroni's where both occur). Their number of queries is that of
    :func:`effective_queries` (Korn and Graubard, "Confidence intervals for proportions with small expected number of
    positive counts estimated from survey data", Survey Methodology 1998).

    Args:
        values: (n,) bool or float64.
        products: (n,) ids of the products.
        confidence: Probability that the interval covers the true mean.
        seed: Seed of the resamples.
        lowest: Smallest possible value: 0 for hits and precisions, -1 for differences of two models. The largest is 1.
        correlation: Correlation within a product that the exact bounds assume. 1 makes no assumption.
    """
    grouped = sum_by_product(values, products)
    count = len(grouped.sizes)
    if count < MIN_PRODUCTS:
        return None
    if grouped.varying < MIN_VARYING:
        return _exact_interval(np.asarray(values, dtype=np.float64), grouped, lowest, confidence, correlation)
    return _percentiles(_resampled_means(grouped, seed), effective_queries(grouped.sizes, 1.0), confidence)


def ratio_interval(
    values: Values, reference: Values, products: Ids, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """Return the interval of the mean of (n,) values over that of (n,) reference values, such as retention.

    The bootstrap resamples products as in :func:`mean_interval`. None with fewer than 10 products, or if a resample
    has a reference of 0.
    """
    upper, lower = sum_by_product(values, products), sum_by_product(reference, products)
    if len(upper.sizes) < MIN_PRODUCTS:
        return None
    tops, bottoms = _resampled_means(upper, seed), _resampled_means(lower, seed)
    if (bottoms == 0).any():
        return None
    return _percentiles(tops / bottoms, effective_queries(upper.sizes, 1.0), confidence)


def sign_flip_p_value(values: Values, products: Ids, seed: int = 0) -> float:
    """Return the two-sided p-value of the hypothesis that paired differences of (n,) queries are symmetric around 0.

    Under the hypothesis, the differences of a product are as likely as their negatives; all queries of a product are
    flipped together (randomisation test, Fisher 1935). 9,999 random flips and the data themselves are compared. Five
    or fewer changed products cannot give less than .06.
    """
    sums = sum_by_product(values, products).sums
    changed = sums[np.abs(sums) > 1e-12]
    if not len(changed):
        return 1.0
    rng, observed, extreme = np.random.default_rng(seed), abs(float(changed.sum())), 1
    step = max(1, _BLOCK // len(changed))
    for start in range(0, _FLIPS, step):
        signs = rng.choice((-1.0, 1.0), (min(step, _FLIPS - start), len(changed)))
        extreme += int((np.abs(signs @ changed) >= observed - 1e-9).sum())
    return extreme / (_FLIPS + 1)


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm, Scandinavian Journal of Statistics 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * factors), 1)
    return adjusted[np.argsort(order, kind="stable")].tolist()


def clopper_pearson_upper(share: float, count: float, confidence: float) -> float:
    """Return the one-sided upper bound of a proportion, ``share`` of ``count``. ``count`` need not be an integer."""
    events = share * count
    return 1.0 if share >= 1 else float(betaincinv(events + 1, count - events, confidence))


def intraclass_correlation(grouped: ProductSums) -> float:
    """Estimate the correlation of two queries of a product by analysis of variance, from 0 to 1.

    The estimator for clusters of different sizes is that of Donner ("A review of inference procedures for the
    intraclass correlation coefficient", International Statistical Review 1986, eq. 2.1). Without products of several
    queries, or if all values are equal, the data do not tell, and the result is 1.
    """
    sizes, count, queries = grouped.sizes, len(grouped.sizes), grouped.queries
    if count < 2 or queries == count:
        return 1.0
    means = grouped.sums / sizes
    between = float((sizes * (means - grouped.mean) ** 2).sum()) / (count - 1)
    within = float((grouped.squares - sizes * means**2).sum()) / (queries - count)
    typical = (queries - float((sizes**2).sum()) / queries) / (count - 1)
    total = between + (typical - 1) * within
    return 1.0 if total <= 0 else float(np.clip((between - within) / total, 0, 1))


def effective_queries(sizes: NDArray[np.float64], correlation: float) -> float:
    """Return the number of independent queries that say as much as these.

    Their number is divided by the design effect 1 + (m - 1) * correlation (Kish, "Survey Sampling", 1965), where m is
    the size of a product weighted by its queries, as products differ in size (Donner and Klar, "Design and Analysis of
    Cluster Randomization Trials in Health Research", 2000). Correlation 1 gives Kish's effective number of products.
    """
    queries = float(sizes.sum())
    weighted_size = float((sizes**2).sum()) / queries
    return queries / (1 + (weighted_size - 1) * correlation)


def _percentiles(resampled: NDArray[np.float64], products: float, confidence: float) -> Interval:
    """Return the percentiles of resampled statistics, widened for the effective number of products."""
    products = max(products, 2.0)
    tail = float(ndtr(np.sqrt(products / (products - 1)) * stdtrit(products - 1, (1 - confidence) / 2)))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _exact_interval(
    values: NDArray[np.float64], grouped: ProductSums, lowest: float, confidence: float, correlation: float
) -> Interval:
    """Bound the mean deviation from the median product upwards and downwards."""
    centre = float(np.median(grouped.sums / grouped.sizes))
    count = effective_queries(grouped.sizes, correlation)

    def share(deviations: NDArray[np.float64], room: float) -> float:
        return float(np.maximum(deviations, 0).mean()) / room if room > 0 else 0.0

    rooms = (1 - centre, centre - lowest)  # the largest deviations upwards and downwards
    above, below = share(values - centre, rooms[0]), share(centre - values, rooms[1])

    def end(towards: float, room: float, against: float, other_room: float) -> float:
        """Return the largest deviation in a direction: an upper bound there less a lower bound of the other."""
        level = (1 + confidence) / 2 if against == 0 or room == 0 else (3 + confidence) / 4
        return room * clopper_pearson_upper(towards, count, level) - other_room * _lower(against, count, level)

    return centre - end(below, rooms[1], above, rooms[0]), centre + end(above, rooms[0], below, rooms[1])


def _lower(share: float, count: float, confidence: float) -> float:
    """Return the one-sided lower bound of a proportion (Clopper-Pearson)."""
    return 1 - clopper_pearson_upper(1 - share, count, confidence)


def _resampled_means(grouped: ProductSums, seed: int) -> NDArray[np.float64]:
    """Return the means of resamples of products, (resamples,) float64."""
    rng, count = np.random.default_rng(seed), len(grouped.sizes)
    block = max(1, _BLOCK // count)
    means = []
    for start in range(0, _RESAMPLES, block):
        drawn = rng.integers(0, count, (min(block, _RESAMPLES - start), count))
        means.append(grouped.sums[drawn].sum(axis=1) / grouped.sizes[drawn].sum(axis=1))
    return np.concatenate(means)
