from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.sensitivity import Layers, LayerSetScore, search_quantised_layers

QUERIES = 1000


def _additive(costs: dict[str, int]) -> object:
    """Each layer loses its own number of queries, one after the other."""

    def evaluate(quantised: Layers) -> LayerSetScore:
        lost = sum(costs[layer] for layer in quantised)
        hits = np.ones(QUERIES, dtype=bool)
        hits[: max(lost, 0)] = False
        return LayerSetScore(hits, 1 - 1e-4 * sum(max(costs[layer], 0) for layer in quantised))

    return evaluate


def test_all_are_quantised_where_the_budget_bears_it() -> None:
    found = search_quantised_layers(["a", "b"], _additive({"a": 1, "b": 2}), 0.005)
    assert found.met
    assert found.chosen.quantised == {"a", "b"}
    assert found.chosen.drop == pytest.approx(0.003)
    assert not found.alone  # nothing had to be tried alone
    assert all("within the budget" in reason for reason in found.reasons.values())


def test_the_harmful_layer_is_kept_and_the_reason_says_so() -> None:
    found = search_quantised_layers(["a", "b", "c"], _additive({"a": 1, "b": 40, "c": 2}), 0.005)
    assert found.met
    assert found.chosen.quantised == {"a", "c"}
    assert found.reasons["b"].startswith("kept: alone it costs +0.0400 recall@1")
    assert found.reasons["a"].startswith("quantised: alone it costs +0.0010")
    assert next(iter(found.alone[0].quantised)) == "b"
    low, high = found.chosen.interval
    assert low <= 0.003 <= high


def test_nothing_within_the_budget_is_said_and_the_nearest_is_given() -> None:
    found = search_quantised_layers(["a", "b"], _additive({"a": 30, "b": 20}), 0.005)
    assert not found.met
    assert found.chosen.quantised == {"b"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=7), st.integers(0, 40))
def test_where_harm_adds_up_the_set_is_the_largest_there_is(costs: list[int], budget: int) -> None:
    layers = {f"layer{i}": cost for i, cost in enumerate(costs)}
    found = search_quantised_layers(list(layers), _additive(layers), budget / QUERIES + 1e-9)
    fits = [
        some
        for n in range(1, len(layers) + 1)
        for some in combinations(layers, n)
        if sum(layers[x] for x in some) <= budget
    ]
    assert found.met == bool(fits)
    if fits:
        assert len(found.chosen.quantised) == max(len(some) for some in fits)
        assert sum(layers[x] for x in found.chosen.quantised) <= budget
    else:
        assert (
            found.chosen.quantised == {min(layers, key=lambda x: layers[x])}
            or found.chosen.drop == min(costs) / QUERIES
        )


def test_no_set_is_scored_twice() -> None:
    asked: list[Layers] = []
    score = _additive({"a": 9, "b": 1, "c": 8, "d": 0, "e": 3})

    def evaluate(quantised: Layers) -> LayerSetScore:
        asked.append(quantised)
        return score(quantised)

    search_quantised_layers(["a", "b", "c", "d", "e"], evaluate, 0.004)
    assert len(asked) == len(set(asked))
