from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from vpr.retrieval.intervals import (
    adjust_p_values,
    clopper_pearson_upper,
    effective_queries,
    intraclass_correlation,
    mean_interval,
    ratio_interval,
    sign_flip_p_value,
    sum_by_product,
)


def _products(count: int, queries: int) -> np.ndarray:
    return np.repeat(np.arange(count), queries).astype(str)


@settings(max_examples=20, deadline=None)
@given(st.integers(40, 300), st.floats(0.2, 0.8))
def test_interval_is_that_of_student_with_one_query_of_each_product(n: int, share: float) -> None:
    values = np.arange(n) < round(n * share)
    interval = mean_interval(values, np.arange(n).astype(str))
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)
    assume(min(values.sum(), (~values).sum()) >= 10)
    np.testing.assert_allclose(interval, [values.mean() - half, values.mean() + half], atol=0.15 * half + 1 / n)


def test_repeated_queries_do_not_narrow_the_interval() -> None:
    """Ten equal queries of a product say no more than one, so the interval is as wide."""
    rng = np.random.default_rng(0)
    values = rng.random(80) < 0.4
    single = mean_interval(values, np.arange(80).astype(str))
    repeated = mean_interval(np.repeat(values, 10), _products(80, 10))
    assert single == repeated


def test_interval_equals_a_loop_over_resampled_products() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 9, 60)
    products = np.repeat(np.arange(60), sizes).astype(str)
    values = rng.random(len(products)) < rng.beta(1, 2, 60).repeat(sizes)
    rows = [np.flatnonzero(products == name) for name in np.unique(products)]
    means = []
    for _ in range(4000):
        drawn = np.concatenate([rows[index] for index in rng.integers(0, 60, 60)])
        means.append(values[drawn].mean())
    interval = mean_interval(values, products)
    # Student's t with 59 degrees of freedom moves the 2.5 % tail to 2.2 %.
    np.testing.assert_allclose(interval, np.quantile(means, [0.022, 0.978]), atol=0.008)


def test_fewer_than_ten_products_have_no_interval() -> None:
    values = np.arange(90) % 2 == 0
    assert mean_interval(values, _products(9, 10)) is None
    assert mean_interval(values, _products(10, 9)) is not None
    assert ratio_interval(values, values, _products(9, 10)) is None


@pytest.mark.parametrize("is_hit", [True, False])
def test_equal_hits_have_the_exact_bound(is_hit: bool) -> None:
    """With 20 products, (1 - p)^20 = 0.025 gives 16.8 %, however many queries the products have."""
    interval = mean_interval(np.full(60, is_hit), _products(20, 3))
    bound = 1 - 0.025 ** (1 / 20)
    assert interval == pytest.approx((1 - bound, 1) if is_hit else (0, bound))


def test_few_misses_have_both_exact_bounds() -> None:
    interval = mean_interval(np.arange(40) >= 4, np.arange(40).astype(str))
    expected = stats.binomtest(36, 40).proportion_ci(0.95)
    assert interval == pytest.approx((expected.low, expected.high))


def test_changes_in_both_directions_are_bounded_together() -> None:
    """Five of 60 queries are lost and two are won: Bonferroni's bounds on both, 98.75 % each."""
    values = np.zeros(60)
    values[:5], values[5:7] = 1, -1
    lost, won = (stats.binomtest(count, 60).proportion_ci(0.975) for count in (5, 2))
    interval = mean_interval(values, np.arange(60).astype(str), lowest=-1)
    assert interval == pytest.approx((lost.low - won.high, lost.high - won.low))


def test_unchanged_queries_have_the_exact_bound_in_both_directions() -> None:
    products = _products(20, 3)
    bound = 1 - 0.025 ** (1 / 20)
    assert mean_interval(np.zeros(60), products, lowest=-1) == pytest.approx((-bound, bound))
    narrow = mean_interval(np.zeros(60), products, lowest=-1, correlation=0.0)
    assert narrow == pytest.approx((-(1 - 0.025 ** (1 / 60)), 1 - 0.025 ** (1 / 60)))


@settings(max_examples=50)
@given(st.integers(1, 200), st.data(), st.sampled_from([0.9, 0.95, 0.99]))
def test_clopper_pearson_equals_scipy(count: int, data: st.DataObject, confidence: float) -> None:
    events = data.draw(st.integers(0, count))
    expected = stats.binomtest(events, count, alternative="less").proportion_ci(confidence).high
    assert clopper_pearson_upper(events / count, count, confidence) == pytest.approx(expected, abs=1e-9)


def test_correlation_equals_the_analysis_of_variance() -> None:
    """Shrout and Fleiss (1979), ICC(1), from the mean squares of scipy's one-way analysis of variance."""
    rng = np.random.default_rng(2)
    table = rng.normal(size=(50, 1)) + rng.normal(size=(50, 6))
    between = 6 * table.mean(axis=1).var(ddof=1)
    within = table.var(axis=1, ddof=1).mean()
    assert stats.f_oneway(*table).statistic == pytest.approx(between / within)
    expected = (between - within) / (between + 5 * within)
    assert intraclass_correlation(sum_by_product(table.ravel(), _products(50, 6))) == pytest.approx(expected)


def test_correlation_without_evidence_is_one() -> None:
    assert intraclass_correlation(sum_by_product(np.arange(5.0), _products(5, 1))) == 1
    assert intraclass_correlation(sum_by_product(np.zeros(10), _products(5, 2))) == 1


def test_effective_queries_are_between_products_and_queries() -> None:
    sizes = np.full(30, 4.0)
    assert effective_queries(sizes, 0) == 120
    assert effective_queries(sizes, 1) == 30
    assert effective_queries(np.array([1.0, 9.0]), 1) == pytest.approx(100 / 82)  # Kish's effective number


def test_sign_flips_equal_all_flips() -> None:
    rng = np.random.default_rng(3)
    sums = rng.integers(-3, 6, 10).astype(float)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
    exact = np.mean(np.abs(sums @ signs) >= abs(sums.sum()) - 1e-9)
    assert sign_flip_p_value(sums, np.arange(10).astype(str)) == pytest.approx(exact, abs=0.015)
    assert sign_flip_p_value(np.zeros(10), np.arange(10).astype(str)) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_a_loop(p_values: list[float]) -> None:
    expected, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        expected[index] = running
    assert adjust_p_values(p_values) == pytest.approx(expected)


def test_ratio_of_equal_values_is_one() -> None:
    rng = np.random.default_rng(4)
    values = rng.random(300) < 0.5
    assert ratio_interval(values, values, _products(30, 10)) == (1, 1)
    assert ratio_interval(values, np.zeros(300), _products(30, 10)) is None
