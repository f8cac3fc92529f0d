from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from vpr.common.errors import UserError
from vpr.retrieval.metrics import average_precision, bootstrap_interval, evaluate, evaluate_similarities
from vpr.retrieval.search import search


def _unit_vectors(rng: np.random.Generator, n: int, dim: int = 16) -> np.ndarray:
    vectors = rng.normal(size=(n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _loop_average_precision(relevant: list[bool], k: int) -> float:
    """The AIcrowd formula, written out: (1/GTP) * sum_{r<=k} P@r * rel@r."""
    total = 0.0
    for rank in range(1, min(k, len(relevant)) + 1):
        if relevant[rank - 1]:
            total += sum(relevant[:rank]) / rank
    return total / sum(relevant)


@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any), st.integers(1, 50))
def test_average_precision_equals_a_loop(relevant: list[bool], k: int) -> None:
    assert average_precision(np.array([relevant]), k)[0] == pytest.approx(_loop_average_precision(relevant, k))


def test_average_precision_equals_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, relevant = rng.normal(size=50), rng.random(50) < 0.2
        if not relevant.any():
            continue
        order = np.argsort(-scores)
        assert average_precision(relevant[order][None])[0] == pytest.approx(average_precision_score(relevant, scores))


def test_recall_equals_faiss() -> None:
    rng = np.random.default_rng(1)
    queries, gallery = _unit_vectors(rng, 300), _unit_vectors(rng, 80)
    query_products = rng.integers(0, 20, 300).astype(str)
    gallery_products = np.array([str(i % 20) for i in range(80)])
    scores = evaluate(queries, query_products, gallery, gallery_products)
    _, rows = search(queries, gallery, 10)
    hit = gallery_products[rows] == query_products[:, None]
    assert scores.recall_at_1 == pytest.approx(hit[:, 0].mean())
    assert scores.recall_at_5 == pytest.approx(hit[:, :5].any(axis=1).mean())
    assert scores.recall_at_10 == pytest.approx(hit.any(axis=1).mean())
    assert scores.ci95[0] <= scores.recall_at_1 <= scores.ci95[1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scores_with_ties_equal_a_loop(data: st.DataObject) -> None:
    """Equal similarities are ranked in the order of the gallery."""
    gallery_products = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=14))
    query_products = data.draw(st.lists(st.sampled_from(sorted(set(gallery_products))), min_size=1, max_size=6))
    row = st.lists(
        st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=len(gallery_products), max_size=len(gallery_products)
    )
    similarities = [data.draw(row) for _ in query_products]
    ranks, precisions = [], []
    for product, scores in zip(query_products, similarities, strict=True):
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        relevant = [gallery_products[index] == product for index in order]
        ranks.append(relevant.index(True))
        precisions.append(_loop_average_precision(relevant, len(relevant)))
    metrics = evaluate_similarities(
        np.array(similarities, dtype=np.float32), np.array(query_products), np.array(gallery_products)
    )
    for k, recall in ((1, metrics.recall_at_1), (5, metrics.recall_at_5), (10, metrics.recall_at_10)):
        assert recall == pytest.approx(sum(rank < k for rank in ranks) / len(ranks))
    assert metrics.map == metrics.map_at_1000 == pytest.approx(sum(precisions) / len(precisions))
    assert metrics.hits.tolist() == [rank == 0 for rank in ranks]


def test_gallery_as_queries_scores_one() -> None:
    gallery = _unit_vectors(np.random.default_rng(2), 30)
    names = np.arange(30).astype(str)
    scores = evaluate(gallery, names, gallery, names)
    assert (scores.recall_at_1, scores.map, scores.map_at_1000) == (1.0, 1.0, 1.0)


@settings(max_examples=20)
@given(st.integers(20, 200), st.floats(0.05, 0.95))
def test_bootstrap_interval_is_near_the_normal_one(n: int, share: float) -> None:
    values = np.arange(n) < round(n * share)
    low, high = bootstrap_interval(values)
    mean = values.mean()
    half = 1.96 * np.sqrt(mean * (1 - mean) / n)
    assert low == pytest.approx(mean - half, abs=0.35 * half + 1 / n)
    assert high == pytest.approx(mean + half, abs=0.35 * half + 1 / n)


def test_invalid_evaluation_is_rejected() -> None:
    vectors, names = _unit_vectors(np.random.default_rng(3), 4), np.array(["a", "b", "c", "d"])
    with pytest.raises(UserError, match="not in the gallery, first 'd'"):
        evaluate(vectors, names, vectors[:3], names[:3])
    with pytest.raises(UserError, match="no queries"):
        evaluate(vectors[:0], names[:0], vectors, names)
    with pytest.raises(UserError, match="NaN or infinity"):
        evaluate(vectors * np.nan, names, vectors, names)
    with pytest.raises(UserError, match="dimensions"):
        evaluate(vectors[:, :8], names, vectors, names)
    with pytest.raises(UserError, match="k: expected 1 to 4"):
        search(vectors, vectors, 5)


@pytest.mark.parametrize("gallery", [40, 1500])
def test_map_at_1000_equals_trec_eval(gallery: int) -> None:
    """Both trec_eval's map_cut_1000 and the challenge divide by all relevant images."""
    rng = np.random.default_rng(gallery)
    relevant = rng.random((12, gallery)) < 0.02
    relevant[:, -1] = True  # may be cut off at rank 1000
    judged = {str(q): {str(g): int(rel) for g, rel in enumerate(row)} for q, row in enumerate(relevant)}
    ranked = {str(q): {str(g): float(gallery - g) for g in range(gallery)} for q in range(12)}
    reference = pytrec_eval.RelevanceEvaluator(judged, {"map_cut_1000", "map"}).evaluate(ranked)
    expected = [reference[str(q)]["map_cut_1000"] for q in range(12)]
    np.testing.assert_allclose(average_precision(relevant, 1000), expected, atol=1e-9)
    np.testing.assert_allclose(average_precision(relevant), [reference[str(q)]["map"] for q in range(12)], atol=1e-9)
