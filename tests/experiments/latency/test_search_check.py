from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval

from experiments.figures import ROOT
from experiments.latency.search_check import (
    RANX,
    against_faiss,
    against_ranx,
    our_metrics,
    random_rankings,
    time_search,
)
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import l2_normalize


def test_every_metric_equals_trec_eval() -> None:
    """TREC's ``success`` is our recall: whether any of the first k is relevant."""
    relevant = random_rankings(40, 1200, seed=1)
    judged = {str(q): {str(g): int(rel) for g, rel in enumerate(row)} for q, row in enumerate(relevant)}
    ranked = {str(q): {str(g): float(1200 - g) for g in range(1200)} for q in range(40)}
    names = {"success_1": "recall_at_1", "success_5": "recall_at_5", "success_10": "recall_at_10", "map": "map"}
    names["map_cut_1000"] = "map_at_1000"
    found = pytrec_eval.RelevanceEvaluator(judged, {"success.1,5,10", "map", "map_cut.1000"}).evaluate(ranked)
    for q, ours in enumerate(our_metrics(relevant)):
        for theirs, name in names.items():
            assert ours[name] == pytest.approx(found[str(q)][theirs], abs=1e-9), (q, name)
    assert any(one["map"] != one["map_at_1000"] for one in our_metrics(relevant))


def test_every_metric_equals_ranx() -> None:
    if not (ROOT / RANX).is_dir():
        pytest.skip("ranx has an environment of its own: make other-metrics")
    assert against_ranx(rankings=10, gallery=1200) <= 1e-9


def test_recall_equals_a_faiss_index(catalog: Catalog) -> None:
    part = catalog.select(split="test")
    vectors = l2_normalize(np.random.default_rng(0).standard_normal((len(part), 16), dtype=np.float32))
    assert against_faiss(part, vectors) == 0


def test_search_is_timed_in_turns_after_it_was_found_right() -> None:
    ticks = iter(range(100))
    ours, theirs = time_search(gallery=50, queries=4, dim=8, rounds=3, clock=lambda: float(next(ticks)))
    assert ours.tolist() == theirs.tolist() == [1.0, 1.0, 1.0]
