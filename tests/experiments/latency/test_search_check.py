from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval

from experiments.figures import ROOT
from experiments.latency.search_check import (
    RANX,
    compute_metrics,
    difference_to_faiss,
    difference_to_ranx,
    random_rankings,
    time_search,
)
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import l2_normalize


def test_every_metric_equals_trec_eval() -> None:
    """TREC's ``success`` is recall@k here: whether any of the first k is relevant."""
    relevant = random_rankings(40, 1200, seed=1)
    judged = {str(q): {str(g): int(rel) for g, rel in enumerate(row)} for q, row in enumerate(relevant)}
    ranked = {str(q): {str(g): float(1200 - g) for g in range(1200)} for q in range(40)}
    names = {"success_1": "recall_at_1", "success_5": "recall_at_5", "success_10": "recall_at_10", "map": "map"}
    names["map_cut_1000"] = "map_at_1000"
    expected = pytrec_eval.RelevanceEvaluator(judged, {"success.1,5,10", "map", "map_cut.1000"}).evaluate(ranked)
    for query, metrics in enumerate(compute_metrics(relevant)):
        for trec_name, name in names.items():
            assert metrics[name] == pytest.approx(expected[str(query)][trec_name], abs=1e-9), (query, name)
    assert any(metrics["map"] != metrics["map_at_1000"] for metrics in compute_metrics(relevant))


def test_every_metric_equals_ranx() -> None:
    if not (ROOT / RANX).is_dir():
        pytest.skip("ranx is not installed: make other-metrics")
    assert difference_to_ranx(rankings=10, gallery=1200) <= 1e-9


def test_recall_equals_a_faiss_index(catalog: Catalog) -> None:
    part = catalog.select(split="test")
    vectors = l2_normalize(np.random.default_rng(0).standard_normal((len(part), 16), dtype=np.float32))
    assert difference_to_faiss(part, vectors) == 0


def test_search_is_timed_in_turns() -> None:
    ticks = iter(range(100))
    vpr_seconds, faiss_seconds = time_search(gallery=50, queries=4, dim=8, rounds=3, clock=lambda: float(next(ticks)))
    assert vpr_seconds.tolist() == faiss_seconds.tolist() == [1.0, 1.0, 1.0]
