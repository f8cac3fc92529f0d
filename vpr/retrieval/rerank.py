"""What can be done with embeddings after they are made: whitening, expansion, re-ranking. No labels are used.

Everything is fitted on the gallery alone, so that a query's result does not depend on the other queries;
k-reciprocal re-ranking, as published, is the exception and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.search import search

Vectors = NDArray[np.float32]
_BLOCK = 1024  # rows of a product of all with all


@dataclass(frozen=True)
class Whitening:
    """An affine map fitted on a gallery.

    Attributes:
        mean: (dim,) float64, subtracted first.
        matrix: (dim, out) float64.
    """

    mean: NDArray[np.float64]
    matrix: NDArray[np.float64]

    def __call__(self, vectors: Vectors) -> Vectors:
        """(n, dim) to (n, out), L2-normalised float32."""
        return _l2_normalize((vectors.astype(np.float64) - self.mean) @ self.matrix)


def fit_centring(gallery: Vectors) -> Whitening:
    """The map that subtracts the gallery's mean."""
    return Whitening(gallery.mean(axis=0, dtype=np.float64), np.eye(gallery.shape[1]))


def fit_whitening(gallery: Vectors, dim: int, shrinkage: float = 1e-3) -> Whitening:
    """PCA whitening (Jégou and Chum, "Negative evidences and co-occurences in image retrieval", ECCV 2012).

    Args:
        gallery: (n, d) float32.
        dim: directions of largest variance that are kept, at most d.
        shrinkage: share of the mean variance added to each direction's, so that those of no variance stay finite.

    Raises:
        UserError: more directions than the embeddings have.
    """
    if not 1 <= dim <= gallery.shape[1]:
        raise UserError(f"rerank.whiten: {dim}: the embeddings have {gallery.shape[1]} dimensions: give at most that")
    mean = gallery.mean(axis=0, dtype=np.float64)
    centred = gallery.astype(np.float64) - mean
    variance, directions = np.linalg.eigh(centred.T @ centred / max(1, len(gallery)))
    largest = np.argsort(variance)[::-1][:dim]
    spread = np.clip(variance[largest], 0, None) + shrinkage * max(float(variance.mean()), 1e-12)
    return Whitening(mean, directions[:, largest] / np.sqrt(spread))


def augment_database(gallery: Vectors, k: int, alpha: float) -> Vectors:
    """Each gallery vector joined with its ``k`` nearest others, weighed by similarity^alpha.

    Arandjelović and Zisserman, "Three things everyone should know to improve object retrieval", CVPR 2012, sec. 4;
    the weights are those of :func:`expand_queries`.

    Returns:
        (n, dim) float32, L2-normalised.
    """
    if not k:
        return gallery
    # The nearest is the vector itself, or one equal to it: either way its weight is 1.
    return _expand(np.zeros_like(gallery), gallery, k + 1, alpha)


def expand_queries(query: Vectors, gallery: Vectors, k: int, alpha: float) -> Vectors:
    """Each query joined with its ``k`` nearest gallery vectors, weighed by similarity^alpha (alpha-QE).

    Radenović et al., "Fine-tuning CNN image retrieval with no human annotation", PAMI 2018, sec. 3.3.
    Neighbours of negative similarity have no weight.

    Returns:
        (queries, dim) float32, L2-normalised.
    """
    return _expand(query, gallery, k, alpha, query) if k else query


def k_reciprocal(query: Vectors, gallery: Vectors, k1: int, k2: int, weight: float) -> Vectors:
    """Re-rank by k-reciprocal neighbourhoods (Zhong et al., CVPR 2017, eq. 2 to 12).

    The neighbourhoods are of queries and gallery together, so queries do influence each other. Memory: the
    description of an image has some dozens of values; products of all with all are made in blocks; the result
    is (queries, gallery).

    Args:
        query: (queries, dim) float32, L2-normalised.
        gallery: (gallery, dim) float32, L2-normalised.
        k1: size of a neighbourhood.
        k2: neighbours that descriptions are averaged over (local query expansion).
        weight: lambda, share of the original distance.

    Returns:
        (queries, gallery) float32 distances, smaller is nearer.
    """
    everything = np.concatenate([query, gallery])
    wanted = min(len(everything), max(k1 + 1, k2))
    cosine, near = search(everything, everything, wanted)
    farthest = _farthest(everything)
    reach, half = near[:, : k1 + 1], near[:, : round(k1 / 2) + 1]
    sets = [_reciprocal_neighbours(row, reach) for row in range(len(everything))]
    halves = [_reciprocal_neighbours(row, half) for row in range(len(everything))]
    described = [_encode(row, sets, halves, everything, farthest) for row in range(len(everything))]
    if k2 > 1:
        described = [_average([described[other] for other in near[row, :k2]]) for row in range(len(everything))]
    overlap = _jaccard(described[: len(query)], described[len(query) :], len(everything))
    original = 2 * (1 - query @ gallery.T) / farthest[: len(query), None]
    return ((1 - weight) * (1 - overlap / (2 - overlap)) + weight * original).astype(np.float32)


def transform(query: Vectors, gallery: Vectors, config: RerankConfig) -> tuple[Vectors, Vectors]:
    """Queries and gallery after centring, whitening, augmentation and expansion."""
    if config.whiten or config.centre:
        fitted = fit_whitening(gallery, config.whiten) if config.whiten else fit_centring(gallery)
        query, gallery = fitted(query), fitted(gallery)
    gallery = augment_database(gallery, min(config.dba, len(gallery) - 1), config.alpha)
    return expand_queries(query, gallery, min(config.qe, len(gallery)), config.alpha), gallery


def similarities(query: Vectors, gallery: Vectors, config: RerankConfig) -> Vectors:
    """(queries, gallery) float32 scores of all steps, larger is nearer."""
    query, gallery = transform(query, gallery, config)
    if config.k_reciprocal:
        return -k_reciprocal(query, gallery, config.k1, config.k2, config.weight)
    return query @ gallery.T


def rank(query: Vectors, gallery: Vectors, config: RerankConfig, k: int) -> tuple[Vectors, NDArray[np.int64]]:
    """The ``k`` nearest gallery rows of each query after all steps, best first.

    Returns:
        scores (queries, k) float32 and gallery rows (queries, k) int64.

    Raises:
        UserError: ``k`` out of range or dimensions that differ.
    """
    if not config.k_reciprocal:
        return search(*transform(query, gallery, config), k)
    if not 1 <= k <= len(gallery):
        raise UserError(f"search: k is {k}, the gallery has {len(gallery)} images: choose 1 to that many")
    scores = similarities(query, gallery, config)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


def _expand(start: Vectors, gallery: Vectors, k: int, alpha: float, query: Vectors | None = None) -> Vectors:
    scores, rows = search(gallery if query is None else query, gallery, k)
    weights = np.clip(scores.astype(np.float64), 0, None) ** alpha
    return _l2_normalize(start + np.einsum("nk,nkd->nd", weights, gallery[rows].astype(np.float64)))


def _l2_normalize(vectors: NDArray[np.float64]) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    # A vector that centring takes away (the mean itself) stays zero: it is as near to all.
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _farthest(vectors: Vectors) -> NDArray[np.float64]:
    """(n,) largest squared distance of each vector to any other, above 0."""
    blocks = range(0, len(vectors), _BLOCK)
    least = np.concatenate([(vectors[start : start + _BLOCK] @ vectors.T).min(axis=1) for start in blocks])
    return np.maximum(2 * (1 - least.astype(np.float64)), 1e-12)


def _reciprocal_neighbours(row: int, near: NDArray[np.int64]) -> NDArray[np.int64]:
    """Neighbours of a row that have it for a neighbour too (eq. 2), and itself (equal vectors may crowd it out)."""
    own = near[row]
    return np.union1d(own[(near[own] == row).any(axis=1)], [row])


def _encode(
    row: int,
    sets: list[NDArray[np.int64]],
    halves: list[NDArray[np.int64]],
    vectors: Vectors,
    farthest: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A row's neighbourhood, grown by those that lie in it for two thirds (eq. 3), and its weights (eq. 7), sum 1."""
    own = sets[row]
    grown = [own]
    for other in own:
        theirs = halves[other]
        if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
            grown.append(theirs)
    members = np.unique(np.concatenate(grown))
    distance = 2 * (1 - vectors[members].astype(np.float64) @ vectors[row]) / farthest[row]
    weights = np.exp(-distance)
    return members, weights / weights.sum()


def _average(
    parts: list[tuple[NDArray[np.int64], NDArray[np.float64]]],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    members, place = np.unique(np.concatenate([m for m, _ in parts]), return_inverse=True)
    return members, np.bincount(place, np.concatenate([w for _, w in parts])) / len(parts)


def _jaccard(
    queries: list[tuple[NDArray[np.int64], NDArray[np.float64]]],
    gallery: list[tuple[NDArray[np.int64], NDArray[np.float64]]],
    members: int,
) -> NDArray[np.float64]:
    """(queries, gallery) sums over members of the lesser weight (eq. 10), by lists of who holds a member."""
    held = np.concatenate([m for m, _ in gallery])
    holders = np.repeat(np.arange(len(gallery)), [len(m) for m, _ in gallery])
    weights = np.concatenate([w for _, w in gallery])
    order = np.argsort(held, kind="stable")
    holders, weights = holders[order], weights[order]
    begins = np.searchsorted(held[order], np.arange(members + 1))
    found = np.zeros((len(queries), len(gallery)))
    for row, (own, own_weights) in enumerate(queries):
        for member, weight in zip(own, own_weights, strict=True):
            part = slice(begins[member], begins[member + 1])
            found[row, holders[part]] += np.minimum(weight, weights[part])
    return found
