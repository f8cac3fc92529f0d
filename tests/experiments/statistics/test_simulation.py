"""Error rates of intervals and budgets where the truth is known; fewer runs than ``make figures TOPIC=statistics``."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.statistics.figures import Draw, budgets, coverage, error_rate
from experiments.statistics.simulation import (
    correlated_hits,
    draw_hits,
    draw_noise,
    draw_rare_loss,
    draw_unequal_sizes,
    harmful_network,
    run_search,
    safe_network,
)
from vpr.retrieval.intervals import intraclass_correlation, sum_by_product


def test_true_drop_is_that_of_a_large_sample() -> None:
    rng = np.random.default_rng(0)
    network = harmful_network(rng)
    quantised = frozenset(network.names[::2])
    _, margins, changes = draw_hits(network, 20_000, 3, rng)
    measured = (margins > 0).mean() - (margins + changes[::2].sum(axis=0) > 0).mean()
    assert network.true_drop(quantised) == pytest.approx(measured, abs=0.002)
    assert network.true_drop(frozenset()) == 0


@pytest.mark.parametrize("draw", [draw_noise, draw_rare_loss, draw_unequal_sizes])
def test_true_drop_of_each_scenario_is_that_of_a_large_sample(draw: Draw) -> None:
    before, after, _, drop = draw(40_000, 8, np.random.default_rng(4))
    assert before.mean() - after.mean() == pytest.approx(drop, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("products", "queries"), [(30, 12), (100, 12), (600, 1)])
def test_error_rate_is_that_of_the_test(products: int, queries: int) -> None:
    assert error_rate(draw_noise, 400, products, queries) <= 0.08  # three standard errors above .05


def test_hits_have_the_simulated_correlation() -> None:
    hits, products = correlated_hits(4000, 8, 0.25, 0.3, np.random.default_rng(1))
    assert intraclass_correlation(sum_by_product(hits, products)) == pytest.approx(0.25, abs=0.02)
    assert hits.mean() == pytest.approx(0.3, abs=0.02)


def test_run_uses_the_search_and_its_confirmation() -> None:
    result = run_search(safe_network(np.random.default_rng(2)), 300, 4, 0.02, 0.95, np.random.default_rng(3))
    assert result.confirmed
    assert result.upper_bound <= 0.02


@pytest.mark.slow
def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    by_product, by_query = coverage(500)
    assert 0.92 <= by_product <= 0.98  # three standard errors are 2.9 points
    assert by_query < 0.85


@pytest.mark.slow
@pytest.mark.parametrize(("products", "queries"), [(18, 1), (60, 1), (600, 1), (100, 6), (400, 6)])
def test_confirmed_graphs_keep_the_budget(products: int, queries: int) -> None:
    result = budgets(150, products, queries, is_safe=False)
    assert result["broken"] <= 0.05
    assert result["bound below truth"] <= 0.05


@pytest.mark.slow
def test_safe_graph_is_confirmed() -> None:
    assert budgets(100, 400, 6, is_safe=True)["confirmed"] >= 0.8
