"""Whitening, query expansion and re-ranking of embeddings, without labels.

Each step is fitted on the gallery alone, so a query's result does not depend on the other queries. The exception is
k-reciprocal re-ranking, as published.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.search import check_k, nearest_rows, search

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Encoding = tuple[Rows, NDArray[np.float64]]  # members of a neighbourhood and their weights
_BLOCK = 1024  # rows of a block of the all-pairs product
_BLOCK_VALUES = 1 << 25  # similarities of a block of queries


@dataclass(frozen=True)
class Whitening:
    """Affine map fitted on a gallery: subtract (dim,) float64 ``mean``, then multiply with (dim, out) ``matrix``."""

    mean: NDArray[np.float64]
    matrix: NDArray[np.float64]

    def __call__(self, vectors: Vectors) -> Vectors:
        """Map (n, dim) to (n, out) float32, L2-normalised."""
        return _l2_normalize((vectors.astype(np.float64) - self.mean) @ self.matrix)


def fit_centring(gallery: Vectors) -> Whitening:
    """Return the map that subtracts the mean of the gallery."""
    return Whitening(gallery.mean(axis=0, dtype=np.float64), np.eye(gallery.shape[1]))


def fit_whitening(gallery: Vectors, dim: int, shrinkage: float = 1e-3) -> Whitening:
    """Fit PCA whitening (Jégou and Chum, "Negative evidences and co-occurences in image retrieval", ECCV 2012).

    It keeps the ``dim`` directions of largest variance of an (n, d) float32 gallery. ``shrinkage`` is the share of the
    mean variance that is added to each variance, so that zero variances stay finite.

    Raises:
        UserError: ``dim`` is larger than the dimension of the embeddings.
    """
    if not 1 <= dim <= gallery.shape[1]:
        raise UserError(f"rerank.whiten: expected at most {gallery.shape[1]} (the embedding dimension), got {dim}.")
    mean = gallery.mean(axis=0, dtype=np.float64)
    centred = gallery.astype(np.float64) - mean
    variance, directions = np.linalg.eigh(centred.T @ centred / max(1, len(gallery)))
    largest = np.argsort(variance)[::-1][:dim]
    shrunk = np.clip(variance[largest], 0, None) + shrinkage * max(float(variance.mean()), 1e-12)
    return Whitening(mean, directions[:, largest] / np.sqrt(shrunk))


def augment_database(gallery: Vectors, k: int, alpha: float) -> Vectors:
    """Add its ``k`` nearest others to each (n, dim) gallery vector, weighted by similarity^alpha; L2-normalised.

    Arandjelović and Zisserman, "Three things everyone should know to improve object retrieval", CVPR 2012, sec. 4;
    the weights are those of :func:`expand_queries`.
    """
    if not k:
        return gallery
    # The nearest neighbour is the vector itself or an equal one; its weight is 1 in both cases.
    return _expand(np.zeros_like(gallery), gallery, k + 1, alpha)


def expand_queries(query: Vectors, gallery: Vectors, k: int, alpha: float) -> Vectors:
    """Add its ``k`` nearest gallery vectors to each (n, dim) query, weighted by similarity^alpha; L2-normalised.

    Alpha-QE of Radenović et al., "Fine-tuning CNN image retrieval with no human annotation", PAMI 2018, sec. 3.3.
    Neighbours of negative similarity have weight 0.
    """
    return _expand(query, gallery, k, alpha, query) if k else query


def k_reciprocal(query: Vectors, gallery: Vectors, k1: int, k2: int, lambda_: float) -> Iterator[Vectors]:
    """Yield blocks of (queries, gallery) float32 k-reciprocal distances (Zhong et al., CVPR 2017, eq. 2 to 12).

    Neighbourhoods contain queries and gallery images, so queries influence each other. The encoding of an image has
    some dozens of values, and all-pairs products are computed in blocks: memory grows with the number of images.
    Vectors are (n, dim) float32, L2-normalised. A neighbourhood has ``k1`` neighbours, the encodings of ``k2`` are
    averaged (local query expansion), and ``lambda_`` is the weight of the original distance.
    """
    vectors = np.concatenate([query, gallery])
    rows = range(len(vectors))
    neighbours = search(vectors, vectors, min(len(vectors), max(k1 + 1, k2)))[1]
    farthest = _farthest_distances(vectors)
    full, half = neighbours[:, : k1 + 1], neighbours[:, : round(k1 / 2) + 1]
    sets = [_reciprocal_neighbours(row, full) for row in rows]
    half_sets = [_reciprocal_neighbours(row, half) for row in rows]
    encodings = [_encode(row, sets, half_sets, vectors, farthest) for row in rows]
    if k2 > 1:
        encodings = [_average([encodings[neighbour] for neighbour in neighbours[row, :k2]]) for row in rows]
    index = _InvertedIndex.build(encodings[len(query) :], len(vectors))
    step = max(1, _BLOCK_VALUES // len(gallery))
    for start in range(0, len(query), step):
        block = slice(start, min(start + step, len(query)))
        original = 2 * (1 - query[block] @ gallery.T) / farthest[block, None]
        yield ((1 - lambda_) * index.jaccard(encodings[block]) + lambda_ * original).astype(np.float32)


def transform(query: Vectors, gallery: Vectors, config: RerankConfig) -> tuple[Vectors, Vectors]:
    """Return queries and gallery after centring, whitening, augmentation and expansion."""
    if config.whiten or config.centre:
        fitted = fit_whitening(gallery, config.whiten) if config.whiten else fit_centring(gallery)
        query, gallery = fitted(query), fitted(gallery)
    gallery = augment_database(gallery, min(config.dba, len(gallery) - 1), config.alpha)
    return expand_queries(query, gallery, min(config.qe, len(gallery)), config.alpha), gallery


def similarities(query: Vectors, gallery: Vectors, config: RerankConfig) -> Iterator[Vectors]:
    """Yield blocks of (queries, gallery) float32 scores after all steps, larger is nearer."""
    query, gallery = transform(query, gallery, config)
    if config.k_reciprocal:
        distances = k_reciprocal(query, gallery, config.k1, config.k2, config.original_weight)
        yield from (-block for block in distances)
        return
    step = max(1, _BLOCK_VALUES // len(gallery))
    yield from (query[start : start + step] @ gallery.T for start in range(0, len(query), step))


def rank(query: Vectors, gallery: Vectors, config: RerankConfig, k: int) -> tuple[Vectors, Rows]:
    """Return (queries, k) float32 scores and int64 gallery rows, best first; a wrong ``k`` is a :class:`UserError`."""
    if not config.k_reciprocal:
        return search(*transform(query, gallery, config), k)
    check_k(k, len(gallery))
    scores, rows = [], []
    for block in similarities(query, gallery, config):
        rows.append(np.stack([nearest_rows(row, k) for row in block]))
        scores.append(np.take_along_axis(block, rows[-1], axis=1))
    return np.concatenate(scores), np.concatenate(rows)


def _expand(start: Vectors, gallery: Vectors, k: int, alpha: float, query: Vectors | None = None) -> Vectors:
    scores, rows = search(gallery if query is None else query, gallery, k)
    weights = np.clip(scores.astype(np.float64), 0, None) ** alpha
    return _l2_normalize(start + np.einsum("nk,nkd->nd", weights, gallery[rows].astype(np.float64)))


def _l2_normalize(vectors: NDArray[np.float64]) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    # A vector equal to the mean becomes zero by centring and stays zero.
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _farthest_distances(vectors: Vectors) -> NDArray[np.float64]:
    """Return the largest squared distance of each vector to any other: (n,), above 0."""
    blocks = range(0, len(vectors), _BLOCK)
    min_cosines = np.concatenate([(vectors[start : start + _BLOCK] @ vectors.T).min(axis=1) for start in blocks])
    return np.maximum(2 * (1 - min_cosines.astype(np.float64)), 1e-12)


def _reciprocal_neighbours(row: int, neighbours: Rows) -> Rows:
    """Return the neighbours that have ``row`` as a neighbour too (eq. 2), and ``row``, which equals may displace."""
    candidates = neighbours[row]
    return np.union1d(candidates[(neighbours[candidates] == row).any(axis=1)], [row])


def _encode(
    row: int, sets: list[Rows], half_sets: list[Rows], vectors: Vectors, farthest: NDArray[np.float64]
) -> Encoding:
    """Encode a row by its expanded neighbourhood (eq. 3) and the weights of its members (eq. 7), sum 1.

    A neighbour's half set is added if two thirds of it are in the row's own set.
    """
    neighbourhood = sets[row]
    expanded = [neighbourhood]
    for neighbour in neighbourhood:
        candidates = half_sets[neighbour]
        if len(np.intersect1d(candidates, neighbourhood)) > 2 / 3 * len(candidates):
            expanded.append(candidates)
    members = np.unique(np.concatenate(expanded))
    distance = 2 * (1 - vectors[members].astype(np.float64) @ vectors[row]) / farthest[row]
    weights = np.exp(-distance)
    return members, weights / weights.sum()


def _average(encodings: list[Encoding]) -> Encoding:
    members, index = np.unique(np.concatenate([m for m, _ in encodings]), return_inverse=True)
    return members, np.bincount(index, np.concatenate([w for _, w in encodings])) / len(encodings)


@dataclass(frozen=True)
class _InvertedIndex:
    """Gallery images by the members of their encodings."""

    rows: Rows  # gallery rows, sorted by member
    weights: NDArray[np.float64]  # weight of the member in the encoding of the row
    starts: Rows  # first position of each member
    gallery: int  # number of gallery images

    @classmethod
    def build(cls, gallery: list[Encoding], members: int) -> "_InvertedIndex":
        """Index encodings with members below ``members``."""
        gallery_members = np.concatenate([m for m, _ in gallery])
        rows = np.repeat(np.arange(len(gallery)), [len(m) for m, _ in gallery])
        order = np.argsort(gallery_members, kind="stable")
        starts = np.searchsorted(gallery_members[order], np.arange(members + 1))
        return cls(rows[order], np.concatenate([w for _, w in gallery])[order], starts, len(gallery))

    def jaccard(self, queries: list[Encoding]) -> NDArray[np.float64]:
        """Return (queries, gallery) Jaccard distances of encodings (eq. 10)."""
        overlap = np.zeros((len(queries), self.gallery))
        for row, (members, weights) in enumerate(queries):
            for member, weight in zip(members, weights, strict=True):
                postings = slice(self.starts[member], self.starts[member + 1])
                overlap[row, self.rows[postings]] += np.minimum(weight, self.weights[postings])
        return 1 - overlap / (2 - overlap)  # weights sum to 1, so the union is 2 - overlap
