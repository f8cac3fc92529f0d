from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.metrics import evaluate, evaluate_similarities
from vpr.retrieval.rerank import (
    augment_database,
    expand_queries,
    fit_centring,
    fit_whitening,
    k_reciprocal,
    rank,
    similarities,
)

Vectors = NDArray[np.float32]


def unit_vectors(rng: np.random.Generator, count: int, dim: int) -> Vectors:
    vectors = rng.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def product_arcs(
    seed: int = 0, products: int = 20, views: int = 12, dim: int = 12
) -> tuple[Vectors, Vectors, list[str], list[str]]:
    """Products as arcs on the sphere: neighbours connect one end of an arc to the other."""
    rng = np.random.default_rng(seed)
    vectors, names = [], []
    for product in range(products):
        first, second = unit_vectors(rng, 2, dim)
        for view in range(views):
            angle = math.pi * view / (views - 1) / 1.6
            vectors.append(math.cos(angle) * first + math.sin(angle) * second + 0.12 * rng.standard_normal(dim))
            names.append(str(product))
    images = np.asarray(vectors)
    images = (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float32)
    query = np.arange(len(images)) % views == 0
    labels = np.array(names)
    return images[query], images[~query], labels[query].tolist(), labels[~query].tolist()


def loop_k_reciprocal(query: Vectors, gallery: Vectors, k1: int, k2: int, lambda_: float) -> NDArray[np.float64]:
    """Compute the equations of Zhong et al. with dense float64 matrices and sets."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    n = len(x)
    distance = 2 - 2 * x @ x.T
    distance = distance / distance.max(axis=1, keepdims=True)
    order = np.argsort(distance, axis=1, kind="stable")

    def reciprocal(i: int, k: int) -> set[int]:
        return {int(j) for j in order[i, : k + 1] if i in order[j, : k + 1]}

    encodings = np.zeros((n, n))
    for i in range(n):
        neighbourhood = reciprocal(i, k1)
        expanded = set(neighbourhood)
        for j in neighbourhood:
            half_set = reciprocal(j, round(k1 / 2))
            if len(half_set & neighbourhood) > 2 / 3 * len(half_set):
                expanded |= half_set
        for j in expanded:
            encodings[i, j] = math.exp(-distance[i, j])
        encodings[i] /= encodings[i].sum()
    if k2 > 1:
        encodings = np.stack([encodings[order[i, :k2]].mean(axis=0) for i in range(n)])
    q = len(query)
    result = np.zeros((q, n - q))
    for i in range(q):
        for j in range(n - q):
            intersection = np.minimum(encodings[i], encodings[q + j]).sum()
            union = np.maximum(encodings[i], encodings[q + j]).sum()
            result[i, j] = (1 - lambda_) * (1 - intersection / union) + lambda_ * distance[i, q + j]
    return result


@pytest.mark.parametrize(("k1", "k2", "lambda_"), [(20, 6, 0.3), (5, 1, 0.0), (8, 3, 1.0), (500, 4, 0.5)])
def test_k_reciprocal_equals_a_dense_loop(k1: int, k2: int, lambda_: float) -> None:
    rng = np.random.default_rng(0)
    query, gallery = unit_vectors(rng, 9, 6), unit_vectors(rng, 40, 6)
    distances = np.concatenate(list(k_reciprocal(query, gallery, k1, k2, lambda_)))
    np.testing.assert_allclose(distances, loop_k_reciprocal(query, gallery, k1, k2, lambda_), atol=2e-5)


def test_k_reciprocal_of_equal_vectors_is_finite() -> None:
    same = np.tile(unit_vectors(np.random.default_rng(0), 1, 4), (60, 1))
    assert all(np.isfinite(block).all() for block in k_reciprocal(same[:3], same[3:], 5, 3, 0.3))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_expansion_and_augmentation_equal_a_loop(alpha: float) -> None:
    rng = np.random.default_rng(1)
    query, gallery = unit_vectors(rng, 7, 5), unit_vectors(rng, 30, 5)

    def expand(vector: Vectors, others: Vectors, k: int) -> NDArray[np.float64]:
        cosines = others.astype(np.float64) @ vector.astype(np.float64)
        total = vector.astype(np.float64)
        for index in sorted(range(len(others)), key=lambda i: -cosines[i])[:k]:
            total = total + max(0.0, cosines[index]) ** alpha * others[index]
        return total / np.linalg.norm(total)

    expected = [expand(vector, gallery, 4) for vector in query]
    np.testing.assert_allclose(expand_queries(query, gallery, 4, alpha), expected, atol=1e-5)
    expected = [expand(vector, np.delete(gallery, row, axis=0), 3) for row, vector in enumerate(gallery)]
    np.testing.assert_allclose(augment_database(gallery, 3, alpha), expected, atol=1e-5)


def test_whitening_gives_unit_variances() -> None:
    rng = np.random.default_rng(2)
    gallery = (unit_vectors(rng, 500, 6) * np.array([5, 3, 1, 1, 0.5, 0.1]) + 2).astype(np.float32)
    fitted = fit_whitening(gallery, 4, shrinkage=0)
    mapped = (gallery - gallery.mean(axis=0, dtype=np.float64)) @ fitted.matrix
    np.testing.assert_allclose(mapped.T @ mapped / len(gallery), np.eye(4), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(fitted(gallery), axis=1), 1, atol=1e-5)
    assert np.isfinite(fit_whitening(gallery[:3], 6)(gallery)).all()


def test_centring_subtracts_the_gallery_mean() -> None:
    gallery = unit_vectors(np.random.default_rng(3), 50, 4) + np.float32(1)
    expected = gallery - gallery.mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(fit_centring(gallery)(gallery), expected, atol=1e-5)


CONFIGS = [
    RerankConfig(),
    RerankConfig(centre=True),
    RerankConfig(whiten=3),
    RerankConfig(dba=3, qe=2),
    RerankConfig(k_reciprocal=True, k1=6, k2=3),
    RerankConfig(whiten=4, dba=2, qe=2, k_reciprocal=True, k1=6, k2=2),
]


def dense(query: np.ndarray, gallery: np.ndarray, config: RerankConfig) -> np.ndarray:
    """Return all blocks of similarities as one array."""
    return np.concatenate(list(similarities(query, gallery, config)))


@pytest.mark.parametrize("config", CONFIGS[:2], ids=range(2))
def test_blocks_give_what_one_block_gives(config: RerankConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    query, gallery = unit_vectors(rng, 11, 6), unit_vectors(rng, 30, 6)
    k_reciprocal_config = replace(config, k_reciprocal=True, k1=5, k2=2)
    whole = [dense(query, gallery, steps) for steps in (config, k_reciprocal_config)]
    monkeypatch.setattr("vpr.retrieval.rerank._BLOCK_VALUES", 100)  # three queries
    for steps, expected in zip((config, k_reciprocal_config), whole, strict=True):
        assert len(list(similarities(query, gallery, steps))) == 4
        np.testing.assert_allclose(dense(query, gallery, steps), expected, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_order_of_the_gallery_is_irrelevant(config: RerankConfig) -> None:
    rng = np.random.default_rng(4)
    query, gallery = unit_vectors(rng, 5, 6), unit_vectors(rng, 30, 6)
    order = rng.permutation(30)
    plain, shuffled = dense(query, gallery, config), dense(query, gallery[order], config)
    np.testing.assert_allclose(plain[:, order], shuffled, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS[:4], ids=range(4))
def test_queries_are_independent_without_k_reciprocal(config: RerankConfig) -> None:
    rng = np.random.default_rng(5)
    query, gallery = unit_vectors(rng, 5, 6), unit_vectors(rng, 30, 6)
    together = dense(query, gallery, config)
    for row in range(5):
        np.testing.assert_allclose(dense(query[row : row + 1], gallery, config)[0], together[row], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20))
def test_ranking_follows_the_similarities(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    query, gallery = unit_vectors(rng, 4, 5), unit_vectors(rng, 20, 5)
    for config in CONFIGS:
        if config.whiten > 5:
            continue
        scores, rows = rank(query, gallery, config, k)
        expected = dense(query, gallery, config)
        np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :k], atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(expected, rows, axis=1), scores, atol=1e-5)
        assert all(len(set(row)) == k for row in rows.tolist())


@pytest.mark.parametrize("config", [RerankConfig(k_reciprocal=True, k1=8, k2=3), RerankConfig(dba=3, qe=3)])
def test_reranking_connects_the_ends_of_an_arc(config: RerankConfig) -> None:
    query, gallery, query_products, gallery_products = product_arcs()
    plain = evaluate(query, np.array(query_products), gallery, np.array(gallery_products))
    better = evaluate_similarities(
        similarities(query, gallery, config), np.array(query_products), np.array(gallery_products)
    )
    assert better.map > plain.map + 0.03


def test_default_config_changes_nothing() -> None:
    query, gallery, query_products, gallery_products = product_arcs(1)
    plain = evaluate(query, np.array(query_products), gallery, np.array(gallery_products))
    same = evaluate_similarities(
        similarities(query, gallery, RerankConfig()), np.array(query_products), np.array(gallery_products)
    )
    assert (plain.map, plain.recall_at_1, plain.ci95) == (same.map, same.recall_at_1, same.ci95)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qe": -1}, r"rerank\.qe: expected .+ got -1"),
        ({"k1": 0}, r"rerank\.k1: expected .+ got 0"),
        ({"original_weight": 1.5}, r"rerank\.original_weight: expected .+ got 1\.5"),
        ({"alpha": float("nan")}, r"rerank\.alpha: .*nan"),
    ],
)
def test_values_out_of_range_are_rejected(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RerankConfig(**changes)  # type: ignore[arg-type]


def test_too_many_whitening_directions_are_rejected() -> None:
    with pytest.raises(UserError, match=r"rerank\.whiten: expected at most 5 .*, got 9"):
        dense(
            unit_vectors(np.random.default_rng(0), 2, 5),
            unit_vectors(np.random.default_rng(1), 9, 5),
            RerankConfig(whiten=9),
        )
