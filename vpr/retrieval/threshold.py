"""Threshold of "no match" with a bound on false accepts, by product.

A false accept is an answer to a query of a product that the gallery lacks. The risk of a threshold is the expected
share of a product's queries that are answered. Products are independent, and each has a loss from 0 to 1.

Learn then Test (Angelopoulos et al., arXiv 2110.01052) with fixed-sequence testing (section 5.1): thresholds are tested
from the strictest to the most permissive one, each at the full level, until one fails. The risk falls with the
threshold, so every value between two scores may be tested and no grid is chosen (Bates et al., "Distribution-Free,
Risk-Controlling Prediction Sets", JACM 2021, theorem 1).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, xlogy

from vpr.retrieval.intervals import Ids, Interval, mean_interval
from vpr.retrieval.open_set import Scores, product_weights


def needed_products(max_false_accept: float, confidence: float) -> int:
    """Return the fewest absent products that can confirm a rate, if none of their queries is answered."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-max_false_accept) - 1e-9)


def smallest_confirmable(products: int, confidence: float) -> float:
    """Return the smallest rate that so many absent products can confirm, if none of their queries is answered."""
    return float(-np.expm1(np.log1p(-confidence) / products))


def false_accept_p_values(rates: Scores, products: int, max_false_accept: float, is_exact: bool) -> Scores:
    """Return p-values of the hypothesis that the true rate exceeds ``max_false_accept``, for (n,) measured rates.

    ``is_exact`` is for one query per product: the binomial test of Clopper and Pearson (Biometrika 1934). Shares of
    several queries are between 0 and 1, and the p-value is Hoeffding's or Bentkus's, whichever is smaller (Bates et
    al. 2021, section 3.1.2). All hold for a finite number of products.
    """
    accepted = np.ceil(rates * products - 1e-9)
    binomial = bdtr(accepted, products, max_false_accept)
    if is_exact:
        return binomial
    measured = np.minimum(rates, max_false_accept)
    divergence = xlogy(measured, measured / max_false_accept)
    divergence += xlogy(1 - measured, (1 - measured) / (1 - max_false_accept))
    return np.minimum(np.exp(-products * divergence), np.minimum(np.e * binomial, 1.0))


def confirm_threshold(scores: Scores, products: Ids, max_false_accept: float, confidence: float) -> float | None:
    """Return the lowest threshold with a confirmed rate of false accepts; None if so few products confirm none.

    A query is answered if its score is the threshold or more. With probability ``confidence`` or more over the draw of
    the products, the true rate of the returned threshold is at most ``max_false_accept``.

    Args:
        scores: (queries,) float64, scores of queries of absent products.
        products: (queries,) ids of the products.
        max_false_accept: Largest rate of false accepts, between 0 and 1.
        confidence: Probability that the statement holds, between 0 and 1.
    """
    count = len(np.unique(products))
    order = np.argsort(-scores, kind="stable")
    ranked, weights = scores[order], product_weights(products)[order] / count
    last_of_value = np.append(ranked[1:] != ranked[:-1], True)
    levels = ranked[last_of_value]  # distinct scores, falling
    # Just above a level, all queries of the levels before it are answered.
    rates = np.concatenate([[0.0], np.cumsum(weights)[last_of_value][:-1]])
    p_values = false_accept_p_values(rates, count, max_false_accept, is_exact=count == len(scores))
    failed = np.flatnonzero(p_values > 1 - confidence)
    confirmed = failed[0] if len(failed) else len(levels)
    return float(np.nextafter(levels[confirmed - 1], np.inf)) if confirmed else None


@dataclass(frozen=True)
class ErrorRates:
    """Errors of a threshold on the products that confirm it; means over products of the share of their queries.

    Attributes:
        false_accept: Share of queries of absent products that are answered.
        false_reject: Share of queries of present products that are not answered.
        false_reject_interval: 95 % interval of ``false_reject`` by product; None with fewer than 10 products.
        wrong: Share of queries of present products that are answered with another product.
    """

    false_accept: float
    false_reject: float
    false_reject_interval: Interval | None
    wrong: float


@dataclass(frozen=True)
class ScoredQueries:
    """Scores of the queries that confirm a threshold.

    Attributes:
        scores: (queries,) float64.
        products: (queries,) product ids.
        is_absent: (queries,) bool, whether the gallery lacks the product.
        right: (queries,) bool, whether the best image is of the query's product.
    """

    scores: Scores
    products: Ids
    is_absent: NDArray[np.bool_]
    right: NDArray[np.bool_]

    def error_rates(self, threshold: float, seed: int = 0) -> ErrorRates:
        """Return the errors if queries with this score or more are answered."""
        accepted, present = self.scores >= threshold, ~self.is_absent
        rejected = _share_by_product(~accepted[present], self.products[present])
        wrong = _share_by_product((accepted & ~self.right)[present], self.products[present])
        accepted_absent = _share_by_product(accepted[self.is_absent], self.products[self.is_absent])
        names = np.arange(len(rejected)).astype(np.str_)
        interval = mean_interval(rejected, names, seed=seed)
        return ErrorRates(float(accepted_absent.mean()), float(rejected.mean()), interval, float(wrong.mean()))

    def curve(self, points: int) -> list[tuple[float, float, float, float]]:
        """Return (threshold, false accepts, false rejects, wrong answers) at up to ``points`` rising thresholds."""
        present = ~self.is_absent
        weights = product_weights(self.products)
        weights[present] /= len(np.unique(self.products[present]))
        weights[self.is_absent] /= len(np.unique(self.products[self.is_absent]))
        thresholds = np.unique(np.quantile(self.scores, np.linspace(0, 1, points), method="higher"))
        rows = []
        for threshold in thresholds:
            accepted = self.scores >= threshold
            errors = (accepted & self.is_absent, ~accepted & present, accepted & present & ~self.right)
            false_accept, false_reject, wrong = (float(weights[error].sum()) for error in errors)
            rows.append((float(threshold), false_accept, false_reject, wrong))
        return rows


def _share_by_product(values: NDArray[np.bool_], products: Ids) -> Scores:
    """Return the (products,) share of true values among the queries of each product."""
    codes = np.unique(products, return_inverse=True)[1]
    return np.asarray(np.bincount(codes, values) / np.bincount(codes), dtype=np.float64)
