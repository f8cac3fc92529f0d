from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vpr.common.errors import UserError
from vpr.retrieval.drop_test import DropTest, change_correlation, drop_test, state_result


def _changed(broken: int, corrected: int, products: int, queries: int = 1) -> DropTest:
    """Change one query each of the first products."""
    before = np.arange(products * queries) % 2 == 0
    names = np.repeat(np.arange(products), queries).astype(str)
    before[: (broken + corrected) * queries : queries] = np.arange(broken + corrected) < broken
    after = before.copy()
    after[: (broken + corrected) * queries : queries] ^= True
    return drop_test(before, after, names)


def test_no_change_has_the_exact_bound() -> None:
    test = _changed(0, 0, 60)
    assert test.upper_bound(0.95) == pytest.approx(1 - 0.05 ** (1 / 60))
    assert test.p_value(0.05) == pytest.approx(0.95**60)
    assert test.smallest_confirmable(0.95) == test.upper_bound(0.95)


@pytest.mark.parametrize("broken", [0, 1, 5, 9])
def test_few_changes_equal_the_binomial_test(broken: int) -> None:
    test = _changed(broken, 0, 200)
    expected = stats.binomtest(broken, 200, 0.05, alternative="less")
    assert test.p_value(0.05) == pytest.approx(expected.pvalue)
    assert test.upper_bound(0.9) == pytest.approx(expected.proportion_ci(0.9).high)


def _numeric_tango(broken: int, corrected: int, count: int, drop: float) -> float:
    """Maximise the likelihood under the hypothesis by a search, and standardise (Tango 1998)."""
    shares = np.linspace(1e-9, (1 - drop) / 2 - 1e-9, 400_001)
    same = count - broken - corrected
    likelihood = broken * np.log(shares + drop) + corrected * np.log(shares) + same * np.log(1 - 2 * shares - drop)
    share = shares[int(likelihood.argmax())]
    variance = count * (2 * share + drop * (1 - drop))
    return float((broken - corrected - count * drop) / np.sqrt(variance))


@pytest.mark.parametrize(("broken", "corrected", "drop"), [(12, 7, 0.02), (30, 30, 0.01), (20, 3, 0.05), (6, 14, 0.0)])
def test_score_equals_numeric_likelihood(broken: int, corrected: int, drop: float) -> None:
    test = _changed(broken, corrected, 400)
    score = _numeric_tango(broken, corrected, 400, drop)
    assert test.p_value(drop) == pytest.approx(stats.t.cdf(score, 399), abs=1e-5)


def test_score_at_zero_is_mcnemars() -> None:
    """Without a margin, the score is that of McNemar's test."""
    test = _changed(25, 12, 300)
    assert test.p_value(0.0) == pytest.approx(stats.t.cdf((25 - 12) / np.sqrt(25 + 12), 299))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.floats(0.5, 0.99))
def test_bound_is_where_the_test_confirms(broken: int, corrected: int, confidence: float) -> None:
    test = _changed(broken, corrected, 300)
    bound = test.upper_bound(confidence)
    assert bound >= test.drop
    assert test.p_value(min(bound + 1e-6, 1)) <= 1 - confidence + 1e-9
    assert test.p_value(bound - 1e-4) > 1 - confidence - 1e-9


def test_correlated_changes_widen_the_bound() -> None:
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(100), 10).astype(str)
    before = np.ones(1000, dtype=bool)
    spread, together = before.copy(), before.copy()
    spread[rng.permutation(1000)[:200]] = False
    together[:200] = False  # all queries of 20 products
    assert drop_test(before, together, names).correlation == pytest.approx(1, abs=0.01)
    assert drop_test(before, spread, names).correlation < 0.1
    assert (
        drop_test(before, together, names).upper_bound(0.95) > drop_test(before, spread, names).upper_bound(0.95) + 0.03
    )


def test_correlation_is_measured_given_or_that_of_the_hits() -> None:
    names = np.repeat(np.arange(40), 5).astype(str)
    same_in_product = np.repeat(np.arange(40) % 2 == 0, 5)
    test = drop_test(same_in_product, same_in_product, names)
    assert (test.correlation, test.effective_queries) == (1, 40)
    given = drop_test(same_in_product, same_in_product, names, 0.25)
    assert (given.correlation, given.effective_queries) == (0.25, 100)
    changed = same_in_product ^ (np.arange(200) % 20 == 0)  # one query of each of ten products
    measured = change_correlation(same_in_product, changed, names)
    assert measured is not None
    assert measured < 0.1
    assert drop_test(same_in_product, changed, names, 0.9).correlation == measured
    assert change_correlation(same_in_product, same_in_product, names) is None


def test_needed_products_confirm_when_added() -> None:
    test = _changed(0, 0, 60)
    needed = test.needed_products(0.01, 0.95)
    assert needed == pytest.approx(np.log(0.05) / np.log(0.99), abs=1)
    assert _changed(0, 0, needed + 1).p_value(0.01) <= 0.05
    assert _changed(0, 0, needed - 2).p_value(0.01) > 0.05
    assert _changed(12, 0, 300).needed_products(0.03, 0.95) is None  # the measured drop is .04
    more = _changed(12, 0, 300).needed_products(0.05, 0.95)
    assert more is not None
    assert _changed(round(12 * more / 300), 0, more).p_value(0.05) == pytest.approx(0.05, abs=0.01)


def test_result_is_stated_with_bound_or_with_what_is_missing() -> None:
    assert state_result(_changed(0, 0, 100), 0.05, 0.95, 0.0295) == (
        "confirmed: drop at most 0.05 with 95 % confidence (upper bound 0.0295, 100 products)"
    )
    assert state_result(_changed(0, 0, 100), 0.01, 0.95, 0.0295) == (
        "drop at most 0.01 not confirmable with 95 % confidence with these 100 products: the smallest drop they can "
        "confirm is 0.0295; about 299 products are needed"
    )
    assert state_result(_changed(0, 0, 100), 0.05, 0.95, 0.06) == (
        "confirmed: drop at most 0.05 with 95 % confidence (100 products)"
    )
    text = state_result(_changed(12, 0, 300), 0.02, 0.9, 0.06)
    assert "the measured drop is +0.0400, its upper bound 0.0600" in text
    assert text.endswith("more products with such changes would not confirm it")


def test_fewer_than_ten_products_are_an_error() -> None:
    hits = np.ones(9, dtype=bool)
    with pytest.raises(UserError, match="products: a test needs queries of 10 products, got 9"):
        drop_test(hits, hits, np.arange(9).astype(str))


def test_limits_at_the_ends_have_a_p_value() -> None:
    """Broken queries alone cannot show a gain, and no drop exceeds 1."""
    assert _changed(2, 0, 60).p_value(-0.01) == 1
    assert 0 < _changed(0, 30, 60).p_value(-0.3) < 0.05
    all_broken = drop_test(np.ones(20, dtype=bool), np.zeros(20, dtype=bool), np.arange(20).astype(str))
    assert (all_broken.p_value(1.0), all_broken.upper_bound(0.95)) == (1, 1)
