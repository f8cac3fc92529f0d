"""Test that a model loses no more recall@1 than allowed: one-sided, paired on the same queries, by product."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, stdtr

from vpr.common.errors import UserError
from vpr.retrieval.intervals import (
    MIN_PRODUCTS,
    MIN_VARYING,
    Ids,
    ProductSums,
    clopper_pearson_upper,
    effective_queries,
    intraclass_correlation,
    sum_by_product,
)

_STEPS = 60  # halvings of an interval of drops
_MAX_PRODUCTS = 10_000_000


@dataclass(frozen=True)
class DropTest:
    """Evidence on the drop of recall@1 from one model to another.

    The null hypothesis is that the true drop exceeds a limit. The test is Tango's score test for paired proportions
    ("Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 1998), at the effective number of queries (Rao and Scott, "A simple method for the analysis
    of clustered binary data", Biometrics 1992) and with Student's t for the number of products.

    Where fewer than 10 products change, it is the exact binomial test of the broken queries alone (Clopper and
    Pearson, Biometrika 1934): corrected queries do not count in favour of the model.

    Queries are correlated within products, so both tests are approximate. The number of queries is divided by a design
    effect: the larger of that of the correlation and that of the drop as a ratio of sums over products.

    Attributes:
        products: Number of products.
        queries: Number of queries.
        broken: Number of queries that the model breaks.
        corrected: Number of queries that the model corrects.
        changed_products: Number of products with a changed query.
        correlation: Correlation of changes within a product: measured where 10 products or more change, else the larger
            of the measured and the assumed one.
        assumed_correlation: Correlation that is assumed where fewer products change.
        sizes: (products,) number of queries of each product.
        ratio_effect: Design effect of the drop as a ratio of sums over products; 0 without a change.
    """

    products: int
    queries: int
    broken: int
    corrected: int
    changed_products: int
    correlation: float
    assumed_correlation: float
    sizes: NDArray[np.float64]
    ratio_effect: float

    @property
    def drop(self) -> float:
        """Measured drop of recall@1, negative for a gain."""
        return (self.broken - self.corrected) / self.queries

    @cached_property
    def effective_queries(self) -> float:
        """Number of independent queries that say as much as these."""
        count = effective_queries(self.sizes, self.correlation)
        return min(count, self.queries / self.ratio_effect) if self.ratio_effect > 0 else count

    def p_value(self, max_drop: float) -> float:
        """Return the p-value of the null hypothesis that the true drop exceeds ``max_drop``."""
        return self._p_value(max_drop, 1.0)

    def upper_bound(self, confidence: float) -> float:
        """Return the smallest limit that the test confirms: the one-sided upper bound of the true drop."""
        if self.changed_products < MIN_VARYING:
            return clopper_pearson_upper(self.broken / self.queries, self.effective_queries, confidence)
        low, high = self.drop, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.p_value(middle) <= 1 - confidence else (middle, high)
        return high

    def smallest_confirmable(self, confidence: float) -> float:
        """Return the upper bound of a model that changes no query: no drop below it can be confirmed."""
        return clopper_pearson_upper(0.0, effective_queries(self.sizes, self.assumed_correlation), confidence)

    def needed_products(self, max_drop: float, confidence: float) -> int | None:
        """Estimate the products with which the same changes would confirm ``max_drop``; None if no number would."""
        if self.drop >= max_drop:
            return None
        low, high = 1.0, _MAX_PRODUCTS / self.products
        if self._p_value(max_drop, high) > 1 - confidence:
            return None
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._p_value(max_drop, middle) <= 1 - confidence else (middle, high)
        return int(np.ceil(high * self.products))

    def _p_value(self, max_drop: float, times: float) -> float:
        """Return the p-value of ``times`` as many products with the same changes."""
        count = self.effective_queries * times
        broken, corrected = self.broken / self.queries * count, self.corrected / self.queries * count
        if self.changed_products * times < MIN_VARYING:
            # Broken queries alone cannot show a gain.
            return 1.0 if broken >= count or max_drop < 0 else float(betainc(count - broken, broken + 1, 1 - max_drop))
        return float(stdtr(self.products * times - 1, _score(broken, corrected, count, max_drop)))


def change_correlation(before: NDArray[np.bool_], after: NDArray[np.bool_], products: Ids) -> float | None:
    """Return the correlation of changes within a product; None if fewer than 10 products change."""
    lost = sum_by_product(before.astype(np.float64) - after, products)
    return intraclass_correlation(lost) if (lost.squares > 0).sum() >= MIN_VARYING else None


def drop_test(
    before: NDArray[np.bool_], after: NDArray[np.bool_], products: Ids, correlation: float | None = None
) -> DropTest:
    """Compare (queries,) bool hits of two models; ``products`` are the (queries,) ids.

    ``correlation`` is that of the changes within a product, measured on a similar change; it is assumed where fewer
    than 10 products change. None assumes that changes correlate as the hits before do, which is more than measured
    so far.

    Raises:
        UserError: There are fewer than 10 products.
    """
    lost = sum_by_product(before.astype(np.float64) - after, products)
    count = len(lost.sizes)
    if count < MIN_PRODUCTS:
        raise UserError(f"products: a test needs queries of {MIN_PRODUCTS} products, got {count}. Add products.")
    changed_products = int((lost.squares > 0).sum())
    if correlation is None:
        correlation = intraclass_correlation(sum_by_product(before, products))
    return DropTest(
        products=count,
        queries=len(before),
        broken=int((before & ~after).sum()),
        corrected=int((after & ~before).sum()),
        changed_products=changed_products,
        correlation=_change_correlation(lost, changed_products, correlation),
        assumed_correlation=correlation,
        sizes=lost.sizes,
        ratio_effect=_ratio_effect(lost),
    )


def _change_correlation(lost: ProductSums, changed_products: int, assumed: float) -> float:
    """Return the correlation of changes: a few changed products may raise the assumed one, and not lower it."""
    if not changed_products:
        return assumed
    measured = intraclass_correlation(lost)
    return measured if changed_products >= MIN_VARYING else max(measured, assumed)


def _ratio_effect(lost: ProductSums) -> float:
    """Return the variance of the ratio of sums over products, over that of as many independent queries.

    Rao and Scott, "A simple method for the analysis of clustered binary data", Biometrics 1992, eq. 2.
    """
    queries, drop = lost.queries, lost.mean
    independent = float(lost.squares.sum()) / queries - drop**2
    if independent <= 0:
        return 0.0
    residuals = lost.sums - drop * lost.sizes
    return float((residuals**2).sum()) / queries / independent


def state_result(test: DropTest, max_drop: float, confidence: float, bound: float) -> str:
    """State what the test shows: a bound with its confidence, or what is missing to confirm ``max_drop``.

    ``bound`` is the upper bound of the drop, corrected if the test is one of several. It is stated if it says more than
    ``max_drop``.
    """
    level = f"with {100 * confidence:g} % confidence"
    if test.p_value(max_drop) <= 1 - confidence:
        more = f"upper bound {bound:.4f}, " if bound < max_drop else ""
        return f"confirmed: drop at most {max_drop:g} {level} ({more}{test.products} products)"
    smallest = test.smallest_confirmable(confidence)
    reason = f"the smallest drop they can confirm is {smallest:.4f}"
    if smallest <= max_drop:
        reason = f"the measured drop is {test.drop:+.4f}, its upper bound {bound:.4f}"
    needed = test.needed_products(max_drop, confidence)
    remedy = f"about {needed} products are needed" if needed else "more products with such changes would not confirm it"
    return f"drop at most {max_drop:g} not confirmable {level} with these {test.products} products: {reason}; {remedy}"


def _score(broken: float, corrected: float, count: float, drop: float) -> float:
    """Return Tango's score of the hypothesis that the shares of broken and corrected queries differ by ``drop``.

    The variance uses the likeliest share of corrected queries under the hypothesis (Tango 1998, eq. 3 to 5).
    """
    linear = broken * (1 + drop) + corrected * (1 - drop) - 2 * count * drop
    share = (linear + np.sqrt(linear**2 + 8 * count * corrected * drop * (1 - drop))) / (4 * count)
    variance = count * (2 * share + drop * (1 - drop))
    difference = broken - corrected - count * drop
    if variance > 0:
        return float(difference / np.sqrt(variance))
    return np.inf if difference >= 0 else -np.inf
