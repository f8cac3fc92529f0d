from __future__ import annotations

import numpy as np
import pytest

from calibration.confirmation import confirm_sequence, order_candidates, split_products
from calibration.sensitivity import Decision, Layers, LayerSetScore, search_quantised_layers
from vpr.common.errors import UserError
from vpr.retrieval.drop_test import DropTest, drop_test

NAMES = np.arange(400).astype(str)


def _decision(budget: float = 0.0035) -> Decision:
    """Search layers of which each loses as many of 1,000 queries as its number."""

    def evaluate(quantised: Layers) -> LayerSetScore:
        lost = sum(int(name) for name in quantised)
        return LayerSetScore(np.arange(1000) >= lost, 1 - 1e-4 * lost)

    return search_quantised_layers([str(number) for number in range(9)], evaluate, budget)


def _losing(count: int) -> DropTest:
    before = np.ones(400, dtype=bool)
    return drop_test(before, np.arange(400) >= count, NAMES)


def test_products_are_split_once_and_repeatably() -> None:
    products = np.repeat(np.arange(60), 3).astype(str)
    search, confirmation = split_products(products, 0)
    assert (len(search), len(confirmation)) == (20, 40)
    assert sorted([*search, *confirmation]) == sorted(set(products.tolist()))
    assert [part.tolist() for part in split_products(products[::-1], 0)] == [search.tolist(), confirmation.tolist()]
    assert split_products(products, 1)[0].tolist() != search.tolist()
    assert [len(part) for part in split_products(np.arange(15).astype(str), 0)] == [5, 10]


def test_too_few_products_are_an_error() -> None:
    with pytest.raises(UserError, match="queries of 14 products, and a search and a confirmation need 15"):
        split_products(np.arange(14).astype(str), 0)


def test_candidates_grow_and_keep_the_least_harmful_layers() -> None:
    decision = _decision(budget=1.0)
    candidates = order_candidates(decision, [{"7", "8"}])
    sizes = [len(layers) for layers in candidates]
    assert sizes == sorted(sizes)
    assert candidates[-1] == decision.chosen.quantised == {str(number) for number in range(9)}
    assert frozenset({"7", "8"}) in candidates
    for layers in candidates:
        if layers != {"7", "8"}:
            assert layers == {str(number) for number in range(len(layers))}


def test_candidates_are_subsets_of_the_searched_set() -> None:
    decision = _decision()
    assert decision.chosen.quantised < {str(number) for number in range(9)}
    assert all(layers <= decision.chosen.quantised for layers in order_candidates(decision))


def test_sequence_stops_at_the_first_failure() -> None:
    candidates = [frozenset(map(str, range(size))) for size in (1, 2, 3, 4)]
    losses = dict(zip(candidates, (0, 1, 30, 0), strict=True))
    steps = confirm_sequence(candidates, lambda layers: _losing(losses[layers]), 0.02, 0.95)
    assert [step.confirmed for step in steps] == [True, True, False]
    for step in steps:
        assert step.confirmed is (step.p_value <= 0.05)
        assert step.upper_bound == step.test.upper_bound(1 - 0.05 / 4)  # four candidates


def test_no_candidate_is_tested_after_a_first_failure() -> None:
    tested = []

    def test(layers: Layers) -> DropTest:
        tested.append(layers)
        return _losing(100)

    steps = confirm_sequence([frozenset("a"), frozenset("ab")], test, 0.02, 0.95)
    assert [step.confirmed for step in steps] == [False]
    assert tested == [frozenset("a")]
