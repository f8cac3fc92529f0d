"""Retrieval metrics: ranks of the matching gallery images, recall@k and mean average precision.

Equal similarities are ranked in the order of the gallery, as in :func:`vpr.retrieval.search.search`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.retrieval.intervals import Interval, mean_interval

Vectors = NDArray[np.float32]
Ids = NDArray[np.str_]
Ranks = NDArray[np.int64]
# Similarities that are held at once: 256 MiB of float32, and at most this many queries.
_BLOCK_VALUES = 1 << 26
_BLOCK_QUERIES = 1024
# Up to this many matching images, one comparison of the row for each is faster than a binary search of every value.
_MAX_COMPARED = 48
_COUNTS = "evaluation: vectors and product ids differ in number. Embed the catalogue again."


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
        hits: (queries,) bool, whether the first result has the query's product.
        precisions: (queries,) float64, average precision of each query.
        products: (queries,) ids of the queries' products.
        seed: Seed of the bootstrap.
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    map: float
    map_at_1000: float
    queries: int
    gallery: int
    hits: NDArray[np.bool_]
    precisions: NDArray[np.float64]
    products: Ids
    seed: int = 0

    @cached_property
    def ci95(self) -> Interval | None:
        """95 % interval of ``recall_at_1`` over products; None with too few products."""
        return mean_interval(self.hits, self.products, seed=self.seed)

    @cached_property
    def query_products(self) -> int:
        """Number of products of the queries."""
        return len(np.unique(self.products))


def evaluate(
    query_vectors: Vectors,
    query_products: Ids,
    gallery_vectors: Vectors,
    gallery_products: Ids,
    seed: int = 0,
    own: Ranks | None = None,
) -> RetrievalScores:
    """Rank the gallery by inner product for every query and score the rankings; ``seed`` is that of the bootstrap.

    Vectors are (n, dim) float32, L2-normalised; products are (n,) ids. The memory besides them is below 0.5 GiB.
    ``own`` is the (queries,) gallery row of each query's own image, which is no result of that query.

    Raises:
        UserError: There is nothing to score, a vector is not finite, or the gallery lacks the product of a query
            (its recall would be 0 for every model).
    """
    _check_inputs(query_vectors, query_products, gallery_vectors, gallery_products)
    step = max(1, min(_BLOCK_QUERIES, _BLOCK_VALUES // len(gallery_vectors)))
    blocks = range(0, len(query_vectors), step)
    scores = (query_vectors[start : start + step] @ gallery_vectors.T for start in blocks)
    return _score(scores, query_products, gallery_products, seed, own)


def evaluate_similarities(
    similarities: Vectors | Iterable[Vectors], query_products: Ids, gallery_products: Ids, seed: int = 0
) -> RetrievalScores:
    """Score similarities like :func:`evaluate`: (queries, gallery) float32, larger is nearer, in one or more blocks."""
    check_products(query_products, gallery_products)
    blocks = [similarities] if isinstance(similarities, np.ndarray) else similarities
    return _score(_checked(blocks, len(query_products), len(gallery_products)), query_products, gallery_products, seed)


def matching_ranks(similarities: Vectors, matching: Ranks) -> Ranks:
    """Return the ranks, from 0 and ascending, of the ``matching`` rows in one query's (gallery,) similarities.

    The rank of an image is the number of images that are nearer, or as near and earlier in the gallery. Counting
    them takes one pass over the gallery for each matching image, where a sort takes a dozen and more.
    """
    values = similarities[matching]
    if len(matching) > _MAX_COMPARED:
        return _many_ranks(similarities, matching, np.sort(values))
    ranks = [
        np.count_nonzero(similarities[:row] >= value) + np.count_nonzero(similarities[row:] > value)
        for row, value in zip(matching.tolist(), values, strict=True)
    ]
    return np.sort(np.array(ranks, dtype=np.int64))


def average_precision(ranks: Ranks, k: int | None = None) -> float:
    """Return AP = (1 / GTP) * sum over ranks r <= k of precision@r * rel@r (AIcrowd VPR 2023, k = 1000).

    GTP counts all relevant gallery images, also beyond rank k. ``ranks`` are those of the relevant images, from 0 and
    ascending. Without ``k`` all ranks count.
    """
    precisions = np.arange(1, len(ranks) + 1) / (ranks + 1)
    return float(precisions[ranks < k].sum() if k else precisions.sum()) / len(ranks)


def _many_ranks(similarities: Vectors, matching: Ranks, ascending: Vectors) -> Ranks:
    """Return the ranks by one binary search of every image in the matching images' ``ascending`` similarities.

    Only the images that are as near as a matching one are sorted: a comparison of the row for each of 20,000 matching
    images takes 20 times as long.
    """
    places = np.searchsorted(ascending, similarities, side="left")
    is_equal = ascending[np.minimum(places, len(ascending) - 1)] == similarities
    equal = np.flatnonzero(is_equal)
    order = equal[np.argsort(-similarities[equal], kind="stable")]
    positions = np.flatnonzero(np.isin(order, matching))
    below = np.cumsum(np.bincount(places[~is_equal], minlength=len(ascending) + 1))
    return positions + below[-1] - below[places[order[positions]]]


def _score(
    blocks: Iterable[Vectors], query_products: Ids, gallery_products: Ids, seed: int, own: Ranks | None = None
) -> RetrievalScores:
    order = np.argsort(gallery_products, kind="stable")
    names, starts = np.unique(gallery_products[order], return_index=True)
    rows = dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))
    query_rows = [rows[product] for product in query_products.tolist()]
    if own is not None:
        query_rows = [matching[matching != row] for matching, row in zip(query_rows, own.tolist(), strict=True)]
        check_others(query_rows, query_products)
    ranks: list[Ranks] = []
    for block in blocks:
        if own is not None:  # after all other images, where it changes no rank
            block[np.arange(len(block)), own[len(ranks) : len(ranks) + len(block)]] = -np.inf
        ranks += [matching_ranks(row, query_rows[len(ranks) + index]) for index, row in enumerate(block)]
    first = np.array([query_ranks[0] for query_ranks in ranks])
    precisions = np.array([average_precision(query_ranks) for query_ranks in ranks])
    hits = first == 0
    return RetrievalScores(
        recall_at_1=float(hits.mean()),
        recall_at_5=float((first < 5).mean()),
        recall_at_10=float((first < 10).mean()),
        map=float(precisions.mean()),
        map_at_1000=float(np.mean([average_precision(query_ranks, 1000) for query_ranks in ranks])),
        queries=len(query_products),
        gallery=len(gallery_products),
        hits=hits,
        precisions=precisions,
        products=query_products,
        seed=seed,
    )


def _checked(blocks: Iterable[Vectors], queries: int, gallery: int) -> Iterator[Vectors]:
    """Yield the blocks; raise :class:`UserError` if one is not finite or their shapes do not fit."""
    rows = 0
    for block in blocks:
        _check_finite(block)
        rows += len(block)
        if block.shape[1] != gallery:
            raise UserError(_COUNTS)
        yield block
    if rows != queries:
        raise UserError(_COUNTS)


def _check_inputs(query_vectors: Vectors, query_products: Ids, gallery_vectors: Vectors, gallery_products: Ids) -> None:
    if len(query_vectors) != len(query_products) or len(gallery_vectors) != len(gallery_products):
        raise UserError(_COUNTS)
    check_products(query_products, gallery_products)
    dim, gallery_dim = query_vectors.shape[1], gallery_vectors.shape[1]
    if dim != gallery_dim:
        raise UserError(f"evaluation: queries have {dim} dimensions, the gallery {gallery_dim}. Embed with one model.")
    _check_finite(query_vectors)
    _check_finite(gallery_vectors)


def _check_finite(values: Vectors) -> None:
    if not np.isfinite(values).all():
        raise UserError("evaluation: the embeddings contain NaN or infinity. Check the model with `vpr export parity`.")


def check_others(query_rows: list[Ranks], query_products: Ids) -> None:
    """Raise :class:`UserError` if a query's only matching gallery image is its own."""
    alone = [product for rows, product in zip(query_rows, query_products.tolist(), strict=True) if not len(rows)]
    if alone:
        problem = f"{len(alone)} queries have no gallery image of their product but their own, first '{alone[0]}'"
        raise UserError(f"evaluation: {problem}. Add images of them, or remove the queries.")


def check_products(query_products: Ids, gallery_products: Ids) -> None:
    """Raise :class:`UserError` if there is nothing to score, or the gallery lacks the product of a query."""
    if not len(query_products) or not len(gallery_products):
        raise UserError("evaluation: the split has no queries or no gallery images. Set both roles in its table.")
    absent = sorted(set(query_products.tolist()) - set(gallery_products.tolist()))
    if absent:
        problem = f"{len(absent)} queried products are not in the gallery, first '{absent[0]}'"
        raise UserError(f"evaluation: {problem}. Add images of them, or remove the queries.")
