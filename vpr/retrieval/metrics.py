"""Retrieval metrics: recall@k, mean average precision, and the bootstrap interval of recall@1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError

_BLOCK = 256
_RESAMPLES = 2000


@dataclass(frozen=True)
class RetrievalScores:
    """How well queries find their product in a gallery.

    Attributes:
        recall_at_1: share of queries whose first result is of the same product.
        recall_at_5: share with the product among the first five.
        recall_at_10: share with the product among the first ten.
        map: mean average precision over the whole ranking.
        map_at_1000: mean average precision by the formula of the AIcrowd Visual Product
            Recognition challenge 2023, cut at rank 1000.
        queries: number of queries.
        gallery: number of gallery images.
        ci95: 95 % bootstrap interval of ``recall_at_1`` over queries.
        hits: (queries,) bool, whether the first result is right.
        precisions: (queries,) float64, average precision of each.
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    map: float
    map_at_1000: float
    queries: int
    gallery: int
    ci95: tuple[float, float]
    hits: NDArray[np.bool_]
    precisions: NDArray[np.float64]


def evaluate(
    query_vectors: NDArray[np.float32],
    query_products: NDArray[np.str_],
    gallery_vectors: NDArray[np.float32],
    gallery_products: NDArray[np.str_],
    seed: int = 0,
) -> RetrievalScores:
    """Rank the gallery by inner product for every query and score the rankings.

    Args:
        query_vectors: (queries, dim) float32, L2-normalised.
        query_products: (queries,) product ids.
        gallery_vectors: (gallery, dim) float32, L2-normalised.
        gallery_products: (gallery,) product ids.
        seed: of the bootstrap.

    Raises:
        UserError: nothing to score, vectors that are not finite, or a query whose product is not
            in the gallery (its recall would be 0 whatever the model).
    """
    _check(query_vectors, query_products, gallery_vectors, gallery_products)
    blocks = range(0, len(query_vectors), _BLOCK)
    scores = (query_vectors[start : start + _BLOCK] @ gallery_vectors.T for start in blocks)
    return _score(scores, query_products, gallery_products, seed)


def evaluate_similarities(
    similarities: NDArray[np.float32],
    query_products: NDArray[np.str_],
    gallery_products: NDArray[np.str_],
    seed: int = 0,
) -> RetrievalScores:
    """As :func:`evaluate`, of (queries, gallery) similarities made elsewhere (:mod:`vpr.retrieval.rerank`), larger is nearer."""
    _check(similarities, query_products, similarities.T, gallery_products, same_dim=False)
    blocks = range(0, len(similarities), _BLOCK)
    return _score((similarities[s : s + _BLOCK] for s in blocks), query_products, gallery_products, seed)


def _score(
    blocks: Iterator[NDArray[np.float32]],
    query_products: NDArray[np.str_],
    gallery_products: NDArray[np.str_],
    seed: int,
) -> RetrievalScores:
    codes = {product: code for code, product in enumerate(dict.fromkeys(gallery_products.tolist()))}
    gallery_codes = np.array([codes[p] for p in gallery_products.tolist()])
    query_codes = np.array([codes[p] for p in query_products.tolist()])
    first: list[NDArray[np.int64]] = []
    full: list[NDArray[np.float64]] = []
    cut: list[NDArray[np.float64]] = []
    for number, scores in enumerate(blocks):
        order = np.argsort(-scores, axis=1, kind="stable")
        relevant = gallery_codes[order] == query_codes[number * _BLOCK : (number + 1) * _BLOCK, None]
        first.append(relevant.argmax(axis=1))
        full.append(average_precision(relevant))
        cut.append(average_precision(relevant, 1000))
    rank, precisions = np.concatenate(first), np.concatenate(full)
    hits = rank == 0
    return RetrievalScores(
        recall_at_1=float(hits.mean()),
        recall_at_5=float((rank < 5).mean()),
        recall_at_10=float((rank < 10).mean()),
        map=float(precisions.mean()),
        map_at_1000=float(np.concatenate(cut).mean()),
        queries=len(query_products),
        gallery=len(gallery_products),
        ci95=bootstrap_interval(hits, seed=seed),
        hits=hits,
        precisions=precisions,
    )


def average_precision(relevant: NDArray[np.bool_], k: int | None = None) -> NDArray[np.float64]:
    """AP = (1 / GTP) * sum over ranks r <= k of precision@r * rel@r (AIcrowd VPR 2023, k = 1000).

    GTP counts all relevant gallery images, also those beyond rank k.

    Args:
        relevant: (queries, gallery) bool, the whole ranking of each query, best first.
        k: rank of the cut, none if omitted.

    Returns:
        (queries,) float64.
    """
    total = relevant.sum(axis=1)
    top = relevant[:, :k]
    precision = np.cumsum(top, axis=1) / np.arange(1, top.shape[1] + 1)
    return (precision * top).sum(axis=1) / total


def bootstrap_interval(values: NDArray[np.bool_] | NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron 1979).

    Args:
        values: (n,) one value per query.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    n = len(values)
    means = np.array([values[rng.integers(0, n, n)].mean() for _ in range(_RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _check(
    query_vectors: NDArray[np.float32],
    query_products: NDArray[np.str_],
    gallery_vectors: NDArray[np.float32],
    gallery_products: NDArray[np.str_],
    same_dim: bool = True,
) -> None:
    if not len(query_vectors) or not len(gallery_vectors):
        raise UserError("evaluation: no queries or no gallery images: choose a split with both roles")
    if len(query_vectors) != len(query_products) or len(gallery_vectors) != len(gallery_products):
        raise UserError("evaluation: vectors and product ids differ in number: embed the catalogue again")
    if same_dim and query_vectors.shape[1] != gallery_vectors.shape[1]:
        raise UserError(
            f"evaluation: queries have {query_vectors.shape[1]} dimensions, the gallery {gallery_vectors.shape[1]}: "
            "embed both with the same model"
        )
    if not (np.isfinite(query_vectors).all() and np.isfinite(gallery_vectors).all()):
        raise UserError("evaluation: embeddings hold NaN or infinity: check the model with 'vpr export onnx' parity")
    absent = sorted(set(query_products.tolist()) - set(gallery_products.tolist()))
    if absent:
        raise UserError(f"evaluation: {len(absent)} queried products are not in the gallery, first '{absent[0]}'")
