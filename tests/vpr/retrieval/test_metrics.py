from __future__ import annotations

import timeit
from collections.abc import Callable

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from vpr.common.errors import UserError
from vpr.retrieval import metrics as metrics_module
from vpr.retrieval.metrics import average_precision, evaluate, evaluate_similarities, matching_ranks
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
    assert average_precision(np.flatnonzero(relevant), k) == pytest.approx(_loop_average_precision(relevant, k))


def test_average_precision_equals_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, relevant = rng.normal(size=50), rng.random(50) < 0.2
        if not relevant.any():
            continue
        order = np.argsort(-scores)
        assert average_precision(np.flatnonzero(relevant[order])) == pytest.approx(
            average_precision_score(relevant, scores)
        )


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
    assert scores.query_products == 20
    assert scores.ci95 is not None
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


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([0, 48]))
def test_ranks_equal_a_stable_sort(data: st.DataObject, max_compared: int) -> None:
    """Both ways of counting give the places of the matching images in a stable sort, with many ties."""
    size = data.draw(st.integers(1, 60))
    level = st.sampled_from([-1.0, -0.0, 0.0, 0.25, 1.0])
    similarities = np.array(data.draw(st.lists(level, min_size=size, max_size=size)), dtype=np.float32)
    matching = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
    order = np.argsort(-similarities, kind="stable")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_module, "_MAX_COMPARED", max_compared)
        ranks = matching_ranks(similarities, matching)
    assert ranks.tolist() == np.flatnonzero(np.isin(order, matching)).tolist()


def test_many_matching_images_take_no_comparison_each() -> None:
    """A comparison of the row for each of 20,000 matching images takes 20 times as long as a sort."""
    similarities = np.random.default_rng(3).standard_normal(100_000).astype(np.float32)
    matching = np.arange(0, 100_000, 5)

    def seconds(function: Callable[[], object]) -> float:
        return min(timeit.repeat(function, number=1, repeat=3))

    counted = seconds(lambda: matching_ranks(similarities, matching))
    assert counted < 4 * seconds(lambda: np.argsort(-similarities, kind="stable"))


def test_blocks_give_the_scores_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    queries, gallery = _unit_vectors(rng, 50), _unit_vectors(rng, 60)
    names, gallery_names = (np.arange(50) % 12).astype(str), (np.arange(60) % 12).astype(str)
    whole = evaluate(queries, names, gallery, gallery_names)
    monkeypatch.setattr(metrics_module, "_BLOCK_VALUES", 7 * 60)
    blocks = evaluate(queries, names, gallery, gallery_names)
    given_blocks = (queries[start : start + 9] @ gallery.T for start in range(0, 50, 9))
    given = evaluate_similarities(given_blocks, names, gallery_names)
    for other in (blocks, given):
        assert (other.map, other.hits.tolist(), other.ci95) == (whole.map, whole.hits.tolist(), whole.ci95)


def test_equal_images_rank_alike_in_evaluation_and_search() -> None:
    """A gallery of copies: evaluation and search prefer the earlier copy, whatever its product."""
    rng = np.random.default_rng(5)
    images = _unit_vectors(rng, 40)
    copies = rng.integers(0, 40, 300)
    gallery, products = images[copies], rng.integers(0, 30, 300).astype(str)
    queries, names = _unit_vectors(rng, 100), rng.choice(products, 100)
    scores = evaluate(queries, names, gallery, products)
    for k in (1, 3, 50):
        _, rows = search(queries, gallery, k)
        expected = np.argsort(-(queries @ images.T)[:, copies], axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(rows, expected)
    assert scores.hits.tolist() == (products[search(queries, gallery, 1)[1][:, 0]] == names).tolist()
    same = np.tile(images[:1], (50, 1))
    assert search(same[:2], same, 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_invalid_evaluation_is_rejected() -> None:
    vectors, names = _unit_vectors(np.random.default_rng(3), 4), np.array(["a", "b", "c", "d"])
    with pytest.raises(UserError, match="not in the gallery, first 'd'"):
        evaluate(vectors, names, vectors[:3], names[:3])
    with pytest.raises(UserError, match="no queries"):
        evaluate(vectors[:0], names[:0], vectors, names)
    with pytest.raises(UserError, match="NaN or infinity"):
        evaluate_similarities(np.full((4, 4), np.nan, dtype=np.float32), names, names)
    with pytest.raises(UserError, match="differ in number"):
        evaluate_similarities(np.zeros((3, 4), dtype=np.float32), names, names)
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
    ranks = [np.flatnonzero(row) for row in relevant]
    np.testing.assert_allclose([average_precision(row, 1000) for row in ranks], expected, atol=1e-9)
    full = [reference[str(q)]["map"] for q in range(12)]
    np.testing.assert_allclose([average_precision(row) for row in ranks], full, atol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("is_query", [True, False])
def test_search_for_vectors_that_are_not_finite_is_an_error(value: float, is_query: bool) -> None:
    queries, gallery = (_unit_vectors(np.random.default_rng(4), count) for count in (2, 20))
    (queries if is_query else gallery)[1, 3] = value
    with pytest.raises(UserError, match="search: the embeddings contain NaN or infinity"):
        search(queries, gallery, 3)
