"""``make figures TOPIC=statistics``: intervals and budgets where the truth is known, into ``statistics.json``.

Parts: ``coverage``, ``errors``, ``budget``, ``bounds``, ``entropy``, ``speed``. ``entropy`` needs the demo's artifacts.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.figures import Figure, Row, command_of, measure, record
from experiments.statistics.simulation import (
    Hits,
    Products,
    correlated_hits,
    draw_noise,
    draw_rare_loss,
    draw_unequal_sizes,
    harmful_network,
    run_search,
    safe_network,
)
from experiments.statistics.speed import measure_speed
from export.backends.openvino_runtime import openvino_forward
from export.config import Int8Config
from export.int8 import export_int8
from export.parity import parity
from export.to_onnx import load_onnx
from vpr.common.errors import UserError
from vpr.data.catalog import load_catalog
from vpr.retrieval.drop_test import drop_test
from vpr.retrieval.embeddings import embed
from vpr.retrieval.intervals import mean_interval

Draw = Callable[[int, int, np.random.Generator], tuple[Hits, Hits, Products, float]]

BUDGET = 0.005
CONFIDENCE = 0.95
_DEMO = Path("runs/demo")
_RUNS = 1000
_BUDGET_RUNS = 400


def coverage(
    runs: int, products: int = 100, queries: int = 12, correlation: float = 0.25, share: float = 0.2, seed: int = 0
) -> tuple[float, float]:
    """Return how often the 95 % interval covers the true recall: by product, and by query as if all were products."""
    rng, covered = np.random.default_rng(seed), np.zeros(2)
    for run in range(runs):
        hits, names = correlated_hits(products, queries, correlation, share, rng)
        for index, units in enumerate((names, np.arange(len(hits)).astype(np.str_))):
            interval = mean_interval(hits, units, seed=run)
            covered[index] += interval is not None and interval[0] <= share <= interval[1]
    return float(covered[0] / runs), float(covered[1] / runs)


def budgets(
    runs: int, products: int, queries: int, is_safe: bool, max_drop: float = BUDGET, seed: int = 0
) -> dict[str, float]:
    """Search and confirm ``runs`` times; return shares of the runs and mean drops."""
    rng = np.random.default_rng(seed)
    draw = safe_network if is_safe else harmful_network
    results = [run_search(draw(rng), products, queries, max_drop, CONFIDENCE, rng) for _ in range(runs)]
    return {
        "confirmed": float(np.mean([result.confirmed for result in results])),
        "broken": float(np.mean([result.confirmed and result.true_drop > max_drop for result in results])),
        "bound below truth": float(np.mean([result.upper_bound < result.true_drop for result in results])),
        "search drop": float(np.mean([result.search_drop for result in results])),
        "true search drop": float(np.mean([result.true_search_drop for result in results])),
        "search broken": float(np.mean([result.true_search_drop > max_drop for result in results])),
    }


def error_rate(draw: Draw, runs: int, products: int, queries: int, seed: int = 0) -> float:
    """Return how often the test confirms, at 95 % confidence, a drop that is exactly the true one."""
    rng, confirmed = np.random.default_rng(seed), 0
    for _ in range(runs):
        before, after, names, drop = draw(products, queries, rng)
        confirmed += drop_test(before, after, names).p_value(drop) <= 1 - CONFIDENCE
    return confirmed / runs


def measure_errors() -> None:
    """Record the error rate of one test where the true drop is the limit, also where its assumptions fail."""
    command = command_of("statistics", "errors")
    rows: list[Row] = []
    figures = []
    for title, draw, goal in (
        ("small changes of all margins", draw_noise, 0.06),  # two standard errors above .05
        ("2 % of the products lose all hits", draw_rare_loss, None),
        ("large products lose hits", draw_unequal_sizes, None),
    ):
        for products, queries in ((100, 12), (300, 12)):
            rate = error_rate(draw, _RUNS, products, queries)
            rows.append(
                {"changes": title, "products": products, "queries of each": queries, "error rate": f"{rate:.1%}"}
            )
            name = f"{title}, {products} products: error rate of a test at 5 %"
            figures.append(Figure(name, rate, "", goal, "<=", command))
    record("statistics", figures, {"errors": rows})


def measure_coverage() -> None:
    """Record the coverage of intervals for several numbers of products and shares."""
    command = command_of("statistics", "coverage")
    rows: list[Row] = []
    for products, queries, correlation, share in (
        (20, 12, 0.25, 0.2),
        (100, 12, 0.25, 0.2),
        (100, 12, 0.25, 0.95),
        (100, 1, 0.25, 0.2),
        (1000, 6, 0.35, 0.5),
    ):
        by_product, by_query = coverage(_RUNS, products, queries, correlation, share)
        rows.append(
            {
                "products": products,
                "queries of each": queries,
                "correlation": correlation,
                "recall@1": share,
                "coverage by product": f"{by_product:.1%}",
                "coverage by query": f"{by_query:.1%}",
            }
        )
        if (products, queries, share) == (100, 12, 0.2):
            figures = [
                Figure(
                    "coverage of the 95 % interval, 100 products, correlation .25", by_product, "", 0.93, ">=", command
                ),
                Figure("the same, at most", by_product, "", 0.97, "<=", command),
                Figure("coverage of a bootstrap over queries there", by_query, "", None, ">=", command),
            ]
    record("statistics", figures, {"coverage": rows})


def measure_budget() -> None:
    """Record how often confirmed graphs break the budget, and how often a safe one is confirmed."""
    command = command_of("statistics", "budget")
    rows, figures = [], []
    for title, products, queries, is_safe, max_drop in (
        ("harmful layers", 100, 6, False, BUDGET),
        ("harmful layers", 400, 6, False, BUDGET),
        ("harmful layers", 400, 6, False, 2 * BUDGET),
        ("harmful layers", 200, 12, False, 2 * BUDGET),
        ("a safe graph exists", 100, 6, True, BUDGET),
        ("a safe graph exists", 400, 6, True, BUDGET),
    ):
        result = budgets(_BUDGET_RUNS, products, queries, is_safe, max_drop)
        sizes = {"products": products, "queries of each": queries}
        rows.append({"layers": title, **sizes, "budget": max_drop, **_percent(result)})
        name = f"{title}, {products} products, budget {max_drop:g}"
        figures.append(
            Figure(f"{name}: confirmed graphs that break the budget", result["broken"], "", 0.05, "<=", command)
        )
        figures.append(Figure(f"{name}: bounds below the truth", result["bound below truth"], "", 0.05, "<=", command))
        goal = 0.8 if is_safe and products == 400 else None
        figures.append(Figure(f"{name}: runs that confirm a graph", result["confirmed"], "", goal, ">=", command))
        figures.append(
            Figure(
                f"{name}: searched graphs above the budget, if not confirmed",
                result["search broken"],
                "",
                None,
                "<=",
                command,
            )
        )
    record("statistics", figures, {"budget": rows})


def measure_bounds() -> None:
    """Record how often the reported bound is below the truth, for few and many queries."""
    command = command_of("statistics", "bounds")
    rows, figures = [], []
    for queries in (18, 60, 600):
        result = budgets(_BUDGET_RUNS, queries, 1, False)
        rows.append({"queries": queries, **_percent(result)})
        name = f"{queries} queries of as many products: upper bounds below the truth"
        figures.append(Figure(name, result["bound below truth"], "", 0.05, "<=", command))
    record("statistics", figures, {"bounds": rows})


def measure_entropy() -> None:
    """Record the cosine of the demo's student, which has a convolutional stem, with every range by entropy."""
    if not (_DEMO / "fp32" / "card.json").is_file():
        raise UserError(f"{_DEMO}: found no demo. Run `make demo`.")
    catalog = load_catalog(_DEMO / "catalog")
    graph, model = load_onnx(_DEMO / "fp32")
    assert model.card.preprocess is not None
    test = catalog.select(split="test")
    expected = embed(test, model.card.preprocess, openvino_forward(graph))
    with tempfile.TemporaryDirectory() as folder:
        config = CalibrateConfig(str(_DEMO / "fp32"), str(_DEMO / "catalog"), f"{folder}/ranges", method="entropy")
        int8 = Int8Config(config.onnx, str(calibrate(config)), f"{folder}/int8", base="fp32", scope="full")
        vectors = embed(test, model.card.preprocess, openvino_forward(export_int8(int8) / "model.onnx"))
    loss = 1 - parity(expected, vectors)["cosine_mean"]
    command = command_of("statistics", "entropy")
    figure = Figure("entropy ranges, scope full: mean 1 - cosine to FP32", loss, "", 2e-4, "<=", command)
    record("statistics", [figure], {})


def measure_evaluate() -> None:
    """Record the time of evaluation over that of the matrix product, and its memory with a million images."""
    command = command_of("statistics", "speed")
    small, large = measure_speed(1000, 100_000, 256), measure_speed(10_000, 1_000_000, 256)
    rows = [
        {
            "queries": queries,
            "gallery": gallery,
            "matrix product, s": f"{result['product']:.1f}",
            "evaluate, s": f"{result['evaluate']:.1f}",
            "ratio": f"{result['evaluate'] / result['product']:.2f}",
            "peak memory, GB": f"{result['peak_bytes'] / 1e9:.2f}",
        }
        for (queries, gallery), result in (((1000, 100_000), small), ((10_000, 1_000_000), large))
    ]
    ratio, peak = small["evaluate"] / small["product"], large["peak_bytes"] / 1e9
    figures = [
        Figure("evaluate over the matrix product, 1,000 x 100,000 x 256", ratio, "times", 2.5, "<=", command),
        Figure("peak memory of evaluate, 10,000 x 1,000,000 x 256", peak, "GB", 4, "<=", command),
    ]
    record("statistics", figures, {"speed": rows})


def _percent(result: dict[str, float]) -> Row:
    return {
        "confirmed": f"{result['confirmed']:.1%}",
        "confirmed and above the budget": f"{result['broken']:.1%}",
        "bound below truth": f"{result['bound below truth']:.1%}",
        "search: drop": f"{result['search drop']:.4f}",
        "search: true drop": f"{result['true search drop']:.4f}",
    }


PARTS = {
    "coverage": measure_coverage,
    "errors": measure_errors,
    "budget": measure_budget,
    "bounds": measure_bounds,
    "entropy": measure_entropy,
    "speed": measure_evaluate,
}


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
