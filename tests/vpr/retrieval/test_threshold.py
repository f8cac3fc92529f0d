from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, binom, norm

from vpr.common.errors import UserError
from vpr.retrieval.open_set import BestProducts, divide_products, find_best_products, fit_probability
from vpr.retrieval.threshold import (
    ScoredQueries,
    confirm_threshold,
    false_accept_p_values,
    needed_products,
    smallest_confirmable,
)

LIMIT, CONFIDENCE = 0.1, 0.95


def draw_scores(products: int, queries: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return standard normal scores with a correlation of .7 within a product, and product ids."""
    shared = rng.standard_normal((products, 1)) * 0.7**0.5
    scores = shared + rng.standard_normal((products, queries)) * 0.3**0.5
    return scores.ravel(), np.repeat(np.arange(products), queries).astype(np.str_)


@pytest.mark.parametrize(("products", "queries"), [(60, 1), (60, 5), (150, 5)])
def test_bound_covers_the_true_rate(products: int, queries: int) -> None:
    """The true rate of a threshold t is 1 - Phi(t), whatever the correlation."""
    rng, runs = np.random.default_rng(0), 600
    true_rates, naive_rates = [], []
    for _ in range(runs):
        scores, names = draw_scores(products, queries, rng)
        threshold = confirm_threshold(scores, names, LIMIT, CONFIDENCE)
        assert threshold is not None
        true_rates.append(norm.sf(threshold))
        naive_rates.append(norm.sf(np.quantile(scores, 1 - LIMIT)))
    broken = int((np.array(true_rates) > LIMIT).sum())
    assert broken <= binom.ppf(0.999, runs, 1 - CONFIDENCE)
    # The bound is not trivial, and the quantile of the scores would break it.
    assert np.mean(true_rates) > 0.15 * LIMIT
    assert (np.array(naive_rates) > LIMIT).mean() > 0.3


def test_one_query_per_product_is_clopper_pearson() -> None:
    """The lowest threshold has the most accepted queries that Clopper and Pearson's bound allows."""
    scores = np.random.default_rng(1).permutation(200).astype(np.float64)
    threshold = confirm_threshold(scores, np.arange(200).astype(np.str_), LIMIT, CONFIDENCE)
    assert threshold is not None
    accepted = int((scores >= threshold).sum())
    upper = [beta.ppf(CONFIDENCE, count + 1, 200 - count) for count in (accepted, accepted + 1)]
    assert upper[0] <= LIMIT < upper[1]


def test_p_value_of_shares_is_conservative_and_rises() -> None:
    rates = np.linspace(0, 1, 101)
    exact, shares = (false_accept_p_values(rates, 100, LIMIT, is_exact) for is_exact in (True, False))
    assert (np.diff(exact) >= 0).all()
    assert (np.diff(shares) >= -1e-12).all()
    assert (shares >= exact - 1e-12).all()
    assert shares[0] == pytest.approx((1 - LIMIT) ** 100)


def test_too_few_products_confirm_nothing() -> None:
    assert needed_products(0.01, 0.95) == 299
    assert needed_products(0.5, 0.75) == 2
    for count in (28, 29):
        scores, names = draw_scores(count, 3, np.random.default_rng(count))
        confirmed = confirm_threshold(scores, names, LIMIT, CONFIDENCE)
        assert (confirmed is None) == (count < needed_products(LIMIT, CONFIDENCE))
        assert (smallest_confirmable(count, CONFIDENCE) > LIMIT) == (confirmed is None)


def test_equal_scores_are_answered_together() -> None:
    scores = np.concatenate([np.full(30, 0.5), np.full(270, 0.1)])
    names = np.arange(300).astype(np.str_)
    threshold = confirm_threshold(scores, names, LIMIT, CONFIDENCE)
    assert threshold is not None
    assert threshold > 0.5 > np.nextafter(threshold, -np.inf) - 1e-12
    assert confirm_threshold(scores, names, 0.15, CONFIDENCE) == np.nextafter(0.1, 1)


def test_error_rates_weight_products_equally() -> None:
    """Product a has three queries and b one; c and d are absent."""
    products = np.array(["a", "a", "a", "b", "c", "d", "d"])
    scores = np.array([0.9, 0.8, 0.1, 0.2, 0.1, 0.9, 0.1])
    right = np.array([True, False, True, True, False, False, False])
    queries = ScoredQueries(scores, products, np.array([False] * 4 + [True] * 3), right)
    rates = queries.error_rates(0.5)
    assert rates.false_accept == pytest.approx((0 + 1 / 2) / 2)
    assert rates.false_reject == pytest.approx((1 / 3 + 1) / 2)
    assert rates.wrong == pytest.approx((1 / 3 + 0) / 2)
    assert rates.false_reject_interval is None
    for threshold, *errors in queries.curve(50):
        other = queries.error_rates(threshold)
        assert errors == pytest.approx([other.false_accept, other.false_reject, other.wrong])


def test_margin_is_to_the_best_other_product() -> None:
    """Compared with a matrix product; the product of the first hit has more images than the first search returns."""
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(60, 6))
    gallery[:40] = gallery[0] + 0.01 * rng.normal(size=(40, 6))
    gallery = (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).astype(np.float32)
    products = np.array(["many"] * 40 + [f"p{row // 3}" for row in range(20)])
    queries = np.concatenate([gallery[:2], gallery[45:50]])
    best = find_best_products(queries, gallery, products)
    cosines = queries @ gallery.T
    rows = cosines.argmax(axis=1)
    others = np.where(products[None] == products[rows][:, None], -np.inf, cosines)
    assert np.array_equal(products[best.rows], products[rows])
    assert best.similarity == pytest.approx(cosines.max(axis=1), abs=1e-6)
    assert best.margin == pytest.approx(cosines.max(axis=1) - others.max(axis=1), abs=1e-6)
    with pytest.raises(UserError, match="gallery: expected images of two products"):
        find_best_products(queries, gallery[:40], products[:40])


def test_own_image_is_not_the_best_one() -> None:
    """Compared with a matrix product without the own images; some queries have none."""
    rng = np.random.default_rng(3)
    gallery = rng.normal(size=(60, 6))
    gallery[:40] = gallery[0] + 0.01 * rng.normal(size=(40, 6))
    gallery = (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).astype(np.float32)
    products = np.array(["many"] * 40 + [f"p{row // 3}" for row in range(20)])
    own = np.array([0, 7, -1, 45, 46, -1])
    queries = gallery[[0, 7, 8, 45, 46, 50]]
    best = find_best_products(queries, gallery, products, own)
    cosines = queries.astype(np.float64) @ gallery.T
    cosines[own >= 0, own[own >= 0]] = -np.inf
    others = np.where(products[None] == products[cosines.argmax(axis=1)][:, None], -np.inf, cosines)
    assert np.array_equal(best.rows, cosines.argmax(axis=1))
    assert best.similarity == pytest.approx(cosines.max(axis=1), abs=1e-6)
    assert best.margin == pytest.approx(cosines.max(axis=1) - others.max(axis=1), abs=1e-6)
    two = np.array(["a", "a", "b"])
    with pytest.raises(UserError, match="gallery: expected images of two products"):
        find_best_products(gallery[:1], gallery[40:43], two, np.array([2]))
    assert find_best_products(gallery[:1], gallery[40:43], two, np.array([1])).margin.shape == (1,)


def test_probability_recovers_the_true_one() -> None:
    rng, count = np.random.default_rng(0), 4000
    similarity, margin = rng.uniform(0.2, 1, count), rng.uniform(0, 0.3, count)
    truth = 1 / (1 + np.exp(-(-4 + 5 * similarity + 8 * margin)))
    best = BestProducts(np.zeros(count, np.int64), similarity, margin)
    names = np.arange(count).astype(np.str_)
    fitted = fit_probability(best, rng.random(count) < truth, names)
    assert np.abs(fitted.predict(best) - truth).max() < 0.06
    separable = fit_probability(best, similarity > 0.6, names).predict(best)
    assert np.isfinite(separable).all()
    assert separable[similarity > 0.65].min() > 0.9 > 0.1 > separable[similarity < 0.55].max()
    constant = BestProducts(np.zeros(count, np.int64), np.full(count, 0.5), margin)
    assert np.isfinite(fit_probability(constant, margin > 0.1, names).predict(constant)).all()


def test_products_are_divided_at_random_by_product() -> None:
    queries = np.array([f"p{row % 40}" for row in range(200)])
    gallery = np.array([f"p{row}" for row in range(36)])
    first, again, other = (divide_products(queries, gallery, 0.5, 0.25, seed) for seed in (1, 1, 2))
    parts = [first.present, first.absent, first.present_fit, first.absent_fit]
    assert [len(part) for part in parts] == [14, 16, 4, 6]  # 22 absent: half of 36, and 4 not in the gallery
    assert np.array_equal(np.sort(np.concatenate(parts)), np.unique(queries))
    assert {"p36", "p37", "p38", "p39"} <= set(first.all_absent.tolist())
    assert all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    assert not np.array_equal(first.absent, other.absent)
    with pytest.raises(UserError, match="absent: 1 products stay .* 2 are absent"):
        divide_products(queries[:3], gallery, 0.5, 0.25, 0)
    with pytest.raises(UserError, match="absent: .* 40 are absent"):
        divide_products(queries, gallery[:0], 0.5, 0.25, 0)
