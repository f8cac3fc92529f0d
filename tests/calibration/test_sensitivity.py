from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.sensitivity import Layers, LayerSetScore, search_quantised_layers

QUERIES = 1000


def _additive(costs: dict[str, int]) -> object:
    """Each layer loses a number of queries, and the losses add up."""

    def evaluate(quantised: Layers) -> LayerSetScore:
        lost = sum(costs[layer] for layer in quantised)
        hits = np.ones(QUERIES, dtype=bool)
        hits[: max(lost, 0)] = False
        return LayerSetScore(hits, 1 - 1e-4 * sum(max(costs[layer], 0) for layer in quantised))

    return evaluate


def test_all_layers_within_budget_are_quantised() -> None:
    decision = search_quantised_layers(["a", "b"], _additive({"a": 1, "b": 2}), 0.005)
    assert decision.within_budget
    assert decision.chosen.quantised == {"a", "b"}
    assert decision.chosen.drop == pytest.approx(0.003)
    assert [trial.drop for trial in decision.single_layer_trials] == [pytest.approx(0.002), pytest.approx(0.001)]
    assert all("within the budget" in reason for reason in decision.reasons.values())


def test_harmful_layer_stays_float_with_reason() -> None:
    decision = search_quantised_layers(["a", "b", "c"], _additive({"a": 1, "b": 40, "c": 2}), 0.005)
    assert decision.within_budget
    assert decision.chosen.quantised == {"a", "c"}
    assert decision.reasons["b"].startswith("not quantised: alone it costs +0.0400 recall@1")
    assert decision.reasons["a"].startswith("quantised: alone it costs +0.0010")
    assert next(iter(decision.single_layer_trials[0].quantised)) == "b"
    assert decision.chosen.drop == pytest.approx(0.003)


def test_smallest_drop_wins_if_nothing_fits() -> None:
    decision = search_quantised_layers(["a", "b"], _additive({"a": 30, "b": 20}), 0.005)
    assert not decision.within_budget
    assert decision.chosen.quantised == {"b"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=7), st.integers(0, 40))
def test_additive_harm_gives_the_largest_set(costs: list[int], budget: int) -> None:
    layers = {f"layer{i}": cost for i, cost in enumerate(costs)}
    decision = search_quantised_layers(list(layers), _additive(layers), budget / QUERIES + 1e-9)
    fits = [
        subset
        for size in range(1, len(layers) + 1)
        for subset in combinations(layers, size)
        if sum(layers[name] for name in subset) <= budget
    ]
    assert decision.within_budget == bool(fits)
    if fits:
        assert len(decision.chosen.quantised) == max(len(subset) for subset in fits)
        assert sum(layers[name] for name in decision.chosen.quantised) <= budget
    else:
        assert (
            decision.chosen.quantised == {min(layers, key=lambda name: layers[name])}
            or decision.chosen.drop == min(costs) / QUERIES
        )


def test_no_set_is_scored_twice() -> None:
    scored: list[Layers] = []
    score = _additive({"a": 9, "b": 1, "c": 8, "d": 0, "e": 3})

    def evaluate(quantised: Layers) -> LayerSetScore:
        scored.append(quantised)
        return score(quantised)

    search_quantised_layers(["a", "b", "c", "d", "e"], evaluate, 0.004)
    assert len(scored) == len(set(scored))
