"""Retrieval metrics: recall@k, mean average precision and the bootstrap interval of recall@1."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError

Vectors = NDArray[np.float32]
Ids = NDArray[np.str_]
_BLOCK = 256  # queries
_RESAMPLES = 2000


@dataclass(frozen=True)
class RetrievalScores:
    """Retrieval scores of queries in a gallery.

    Attributes:
        recall_at_1: Share of queries with the same product at rank 1.
        recall_at_5: Share of queries with the product among the first five results.
        recall_at_10: Share of queries with the product among the first ten results.
        map: Mean average precision over the full ranking.
        map_at_1000: Mean average precision by the formula of the AIcrowd Visual Product Recognition challenge 2023,
            cut at rank 1000.
        queries: Number of queries.
        gallery: Number of gallery images.
        ci95: 95 % bootstrap interval of ``recall_at_1`` over queries.
        hits: (queries,) bool, whether the first result has the query's product.
        precisions: (queries,) float64, average precision of each query.
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
    query_vectors: Vectors, query_products: Ids, gallery_vectors: Vectors, gallery_products: Ids, seed: int = 0
) -> RetrievalScores:
    """Rank the gallery by inner product for every query and score the rankings; ``seed`` is that of the bootstrap.

    Vectors are (n, dim) float32, L2-normalised; products are (n,) ids.

    Raises:
        UserError: There is nothing to score, a vector is not finite, or the gallery lacks the product of a query
            (its recall would be 0 for every model).
    """
    _check_inputs(query_vectors, query_products, gallery_vectors, gallery_products)
    blocks = range(0, len(query_vectors), _BLOCK)
    scores = (query_vectors[start : start + _BLOCK] @ gallery_vectors.T for start in blocks)
    return _score(scores, query_products, gallery_products, seed)


def evaluate_similarities(
    similarities: Vectors, query_products: Ids, gallery_products: Ids, seed: int = 0
) -> RetrievalScores:
    """Score given similarities like :func:`evaluate`: (queries, gallery) float32, larger is nearer."""
    _check_inputs(similarities, query_products, similarities.T, gallery_products, same_dim=False)
    blocks = range(0, len(similarities), _BLOCK)
    return _score((similarities[s : s + _BLOCK] for s in blocks), query_products, gallery_products, seed)


def _score(blocks: Iterator[Vectors], query_products: Ids, gallery_products: Ids, seed: int) -> RetrievalScores:
    codes = {product: code for code, product in enumerate(dict.fromkeys(gallery_products.tolist()))}
    gallery_codes = np.array([codes[p] for p in gallery_products.tolist()])
    query_codes = np.array([codes[p] for p in query_products.tolist()])
    first_hits: list[NDArray[np.int64]] = []
    full: list[NDArray[np.float64]] = []
    truncated: list[NDArray[np.float64]] = []
    for block, scores in enumerate(blocks):
        order = np.argsort(-scores, axis=1, kind="stable")
        relevant = gallery_codes[order] == query_codes[block * _BLOCK : (block + 1) * _BLOCK, None]
        first_hits.append(relevant.argmax(axis=1))
        full.append(average_precision(relevant))
        truncated.append(average_precision(relevant, 1000))
    rank, precisions = np.concatenate(first_hits), np.concatenate(full)
    hits = rank == 0
    return RetrievalScores(
        recall_at_1=float(hits.mean()),
        recall_at_5=float((rank < 5).mean()),
        recall_at_10=float((rank < 10).mean()),
        map=float(precisions.mean()),
        map_at_1000=float(np.concatenate(truncated).mean()),
        queries=len(query_products),
        gallery=len(gallery_products),
        ci95=bootstrap_interval(hits, seed=seed),
        hits=hits,
        precisions=precisions,
    )


def average_precision(relevant: NDArray[np.bool_], k: int | None = None) -> NDArray[np.float64]:
    """Return AP = (1 / GTP) * sum over ranks r <= k of precision@r * rel@r (AIcrowd VPR 2023, k = 1000).

    GTP counts all relevant gallery images, also beyond rank k. ``relevant`` is the (queries, gallery) bool ranking of
    each query, best first; the result is (queries,) float64. Without ``k`` all ranks count.
    """
    total = relevant.sum(axis=1)
    top = relevant[:, :k]
    precision = np.cumsum(top, axis=1) / np.arange(1, top.shape[1] + 1)
    return (precision * top).sum(axis=1) / total


def bootstrap_interval(values: NDArray[np.bool_] | NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean (Efron 1979) of (n,) values, one per query."""
    rng = np.random.default_rng(seed)
    n = len(values)
    means = np.array([values[rng.integers(0, n, n)].mean() for _ in range(_RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _check_inputs(
    query_vectors: Vectors, query_products: Ids, gallery_vectors: Vectors, gallery_products: Ids, same_dim: bool = True
) -> None:
    if not len(query_vectors) or not len(gallery_vectors):
        raise UserError("evaluation: the split has no queries or no gallery images. Choose a split with both roles.")
    if len(query_vectors) != len(query_products) or len(gallery_vectors) != len(gallery_products):
        raise UserError("evaluation: vectors and product ids differ in number. Embed the catalogue again.")
    dim, gallery_dim = query_vectors.shape[1], gallery_vectors.shape[1]
    if same_dim and dim != gallery_dim:
        raise UserError(f"evaluation: queries have {dim} dimensions, the gallery {gallery_dim}. Embed with one model.")
    if not (np.isfinite(query_vectors).all() and np.isfinite(gallery_vectors).all()):
        raise UserError("evaluation: the embeddings contain NaN or infinity. Check the model with `vpr export parity`.")
    absent = sorted(set(query_products.tolist()) - set(gallery_products.tolist()))
    if absent:
        problem = f"{len(absent)} queried products are not in the gallery, first '{absent[0]}'"
        raise UserError(f"evaluation: {problem}. Add images of them, or remove the queries.")
