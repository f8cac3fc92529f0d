"""Open-set search: some products are absent from the gallery, and "no match" is the right answer to their queries."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from vpr.common.errors import UserError
from vpr.retrieval.config import ScoreName
from vpr.retrieval.intervals import Ids
from vpr.retrieval.search import search

Rows = NDArray[np.int64]
Vectors = NDArray[np.float32]
Scores = NDArray[np.float64]

_FIRST_K = 16  # gallery images in which a second product is looked for first
_TWO_PRODUCTS = "gallery: expected images of two products or more, to measure the margin. Add products."


@dataclass(frozen=True)
class BestProducts:
    """Best gallery image of each query, and the similarity of the second product.

    Attributes:
        rows: (queries,) int64, gallery row of the best image.
        similarity: (queries,) float64, cosine of the best image.
        margin: (queries,) float64, ``similarity`` minus the cosine of the best image of another product.
    """

    rows: Rows
    similarity: Scores
    margin: Scores

    def select(self, used: NDArray[np.bool_]) -> "BestProducts":
        """Return the queries that ``used``, (queries,) bool, marks."""
        return BestProducts(self.rows[used], self.similarity[used], self.margin[used])


def find_best_products(queries: Vectors, gallery: Vectors, products: Ids, own: Rows | None = None) -> BestProducts:
    """Search (queries, dim) float32 vectors in a (gallery, dim) float32 gallery with (gallery,) product ids.

    ``own`` is the (queries,) gallery row of each query's own image, which is no result of that query, or -1 for none.

    Raises:
        UserError: The gallery has fewer than two products, or one without a query's own image.
    """
    codes = np.unique(products, return_inverse=True)[1]
    if not len(codes) or codes.max() == 0:
        raise UserError(_TWO_PRODUCTS)
    rows = np.zeros(len(queries), dtype=np.int64)
    best, second = np.zeros((2, len(queries)))
    pending, k = np.arange(len(queries)), min(_FIRST_K, len(gallery))
    while len(pending):
        scores, found = search(queries[pending], gallery, k)
        is_result = np.ones(found.shape, dtype=bool) if own is None else found != own[pending, None]
        first = is_result.argmax(axis=1)[:, None]
        nearest = np.take_along_axis(found, first, axis=1)
        is_other = is_result & (codes[found] != codes[nearest])
        complete = is_other.any(axis=1)
        if k == len(gallery) and not complete.all():
            raise UserError(_TWO_PRODUCTS)
        done, column = pending[complete], is_other[complete].argmax(axis=1)
        rows[done] = nearest[complete, 0]
        best[done] = np.take_along_axis(scores, first, axis=1)[complete, 0]
        second[done] = scores[complete, column]
        pending, k = pending[~complete], min(4 * k, len(gallery))
    return BestProducts(rows, best, best - second)


@dataclass(frozen=True)
class Probability:
    """Probability that the best image is of the query's product: logistic in similarity and margin.

    Platt, "Probabilistic outputs for support vector machines", 1999. Its smoothed targets keep the coefficients finite
    where right and wrong answers are separable.
    """

    intercept: float
    similarity: float
    margin: float

    def predict(self, best: BestProducts) -> Scores:
        """Return (queries,) float64 probabilities."""
        return expit(self.intercept + self.similarity * best.similarity + self.margin * best.margin)


def fit_probability(best: BestProducts, right: NDArray[np.bool_], products: Ids) -> Probability:
    """Fit the probability to (queries,) answers that are ``right`` or not; every product has the same weight."""
    weights = product_weights(products)
    positive, negative = float(weights[right].sum()), float(weights[~right].sum())
    targets = np.where(right, (positive + 1) / (positive + 2), 1 / (negative + 2))
    features = np.stack([best.similarity, best.margin], axis=1)
    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    inputs = np.column_stack([np.ones(len(features)), (features - centre) / scale])

    def loss(coefficients: Scores) -> tuple[float, Scores]:
        logits = inputs @ coefficients
        value = weights @ (np.logaddexp(0, logits) - targets * logits)
        return float(value), inputs.T @ (weights * (expit(logits) - targets))

    solution = minimize(loss, np.zeros(3), jac=True, method="BFGS").x
    slopes = solution[1:] / scale
    return Probability(float(solution[0] - slopes @ centre), float(slopes[0]), float(slopes[1]))


def score_queries(name: ScoreName, best: BestProducts, probability: Probability) -> Scores:
    """Return the (queries,) float64 score that is compared with a threshold."""
    if name == "probability":
        return probability.predict(best)
    return best.similarity if name == "similarity" else best.margin


def product_weights(products: Ids) -> Scores:
    """Return (queries,) float64 weights that sum to 1 in each product."""
    _, codes, sizes = np.unique(products, return_inverse=True, return_counts=True)
    return np.asarray(1.0 / sizes[codes], dtype=np.float64)


@dataclass(frozen=True)
class Division:
    """Query products, drawn at random. ``fit`` products train the probability, the other products confirm a threshold.

    Attributes:
        present: Products that stay in the gallery and confirm.
        absent: Products that are removed from the gallery, or were never in it, and confirm.
        present_fit: Products that stay in the gallery and fit.
        absent_fit: Absent products that fit.
    """

    present: Ids
    absent: Ids
    present_fit: Ids
    absent_fit: Ids

    @property
    def all_absent(self) -> Ids:
        """All products that the gallery must not contain."""
        return np.concatenate([self.absent, self.absent_fit])


def divide_products(
    query_products: Ids, gallery_products: Ids, absent_share: float, fit_share: float, seed: int
) -> Division:
    """Draw the absent products and those of the fit, by product.

    ``absent_share`` of the products in the gallery are removed from it. Query products that the gallery lacks are
    absent too. ``fit_share`` of the present and of the absent products fit the probability.

    Raises:
        UserError: There is no present or no absent product to fit or to confirm.
    """
    names = np.unique(query_products)
    rng = np.random.default_rng(seed)
    in_gallery = np.isin(names, gallery_products)
    known = rng.permutation(names[in_gallery])
    removed = round(absent_share * len(known))
    absent, present = rng.permutation(np.concatenate([known[:removed], names[~in_gallery]])), known[removed:]
    counts = [max(1, round(fit_share * len(group))) for group in (present, absent)]
    if len(present) <= counts[0] or len(absent) <= counts[1]:
        problem = f"{len(present)} products stay in the gallery and {len(absent)} are absent"
        raise UserError(f"absent: {problem}; both need products to fit and to confirm. Change --absent or --fit.")
    parts = present[counts[0] :], absent[counts[1] :], present[: counts[0]], absent[: counts[1]]
    return Division(*(np.sort(part) for part in parts))


def probability_to_json(probability: Probability) -> dict[str, float]:
    """Return the coefficients as JSON."""
    return asdict(probability)


def probability_from_json(values: Mapping[str, Any]) -> Probability:
    """Return the probability that :func:`probability_to_json` stored; ValueError if a coefficient is not finite."""
    probability = Probability(**{name: float(values[name]) for name in ("intercept", "similarity", "margin")})
    if not all(np.isfinite(value) for value in asdict(probability).values()):
        raise ValueError("the coefficients of the probability are not finite")
    return probability
