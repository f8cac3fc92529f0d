"""Similarity of images to products, without the image itself: the evidence for wrong labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vpr.retrieval.search import search

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]

NEIGHBOURS = 30  # nearest images of each image that are looked at
_NEAREST = 3  # images of a product that an image is compared with, next to the centroid
_BLOCK = 512  # images at a time: 17 MB of comparisons for 8,192 products
_SEARCHED = 8192  # images per call of the search


@dataclass(frozen=True)
class LabelledVectors:
    """Embeddings with a product each.

    Attributes:
        vectors: (n, dim) float32, L2-normalised.
        labels: (n,) int64, index of each image's product, from 0 and without gaps.
    """

    vectors: Vectors
    labels: Rows

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def counts(self) -> Rows:
        """Number of images of each product, (products,)."""
        return np.bincount(self.labels)

    @cached_property
    def groups(self) -> list[Rows]:
        """Rows of each product, ascending."""
        return np.split(np.argsort(self.labels, kind="stable"), np.cumsum(self.counts)[:-1])

    @cached_property
    def sums(self) -> Vectors:
        """Sum of each product's vectors, (products, dim)."""
        return np.stack([self.vectors[rows].sum(axis=0) for rows in self.groups])

    @cached_property
    def chance(self) -> float:
        """Mean cosine of two images of different products."""
        total = self.sums.sum(axis=0, dtype=np.float64)
        across = total @ total - np.square(self.sums, dtype=np.float64).sum()
        return float(across / (len(self) ** 2 - np.square(self.counts.astype(np.float64)).sum()))


@dataclass(frozen=True)
class Neighbours:
    """Nearest other images of each image, best first: (n, k) float32 cosines and int64 rows."""

    scores: Vectors
    rows: Rows


@dataclass(frozen=True)
class LabelScores:
    """Similarities of images to products.

    Attributes:
        rest: (n,) float32, mean cosine to the other images of the product; NaN for the only image of a product.
        own: (n,) float32, similarity to the product without the image; NaN for the only image of a product.
        other: (n,) float32, similarity to the most similar other product.
        product: (n,) int64, index of that product.
        confident: (n,) bool, whether the image is more similar to the other product than to its product, and at least
            as similar as the other product's images are on average.
    """

    rest: Vectors
    own: Vectors
    other: Vectors
    product: Rows
    confident: NDArray[np.bool_]


def find_neighbours(vectors: Vectors, k: int = NEIGHBOURS) -> Neighbours:
    """Search the ``k`` nearest other images of each image, or all others if there are fewer, in blocks."""
    k = min(k, len(vectors) - 1)
    scores, rows = np.empty((len(vectors), k), np.float32), np.empty((len(vectors), k), np.int64)
    for block in _blocks(len(vectors), _SEARCHED):
        found_scores, found = search(vectors[block], vectors, k + 1)
        is_self = found == np.arange(block.start, block.stop)[:, None]
        is_self[~is_self.any(axis=1), -1] = True  # more than k copies: the image itself is beyond the list
        keep = np.argsort(is_self, axis=1, kind="stable")[:, :k]
        scores[block], rows[block] = (np.take_along_axis(array, keep, axis=1) for array in (found_scores, found))
    return Neighbours(scores, rows)


def score_labels(images: LabelledVectors, near: Neighbours) -> LabelScores:
    """Score each image's product and the most similar other product; there must be two products or more.

    The similarity of an image to a product is the mean of two cosines: to the product's centroid, and to its three
    nearest images, as a product may have views that differ. An image is not compared with itself.

    The decision is that of confident learning (Northcutt, Jiang & Chuang, "Confident Learning: Estimating Uncertainty
    in Dataset Labels", JAIR 2021, eq. 1 and 2), with similarities in place of predicted probabilities: a label is
    doubted if another class reaches that class's mean self-confidence.
    """
    rest, own = _score_own_products(images)
    other, product = np.empty(len(images), np.float32), np.empty(len(images), np.int64)
    centroids = images.sums / np.maximum(np.linalg.norm(images.sums, axis=1, keepdims=True), 1e-12)
    for block in _blocks(len(images), _BLOCK):
        cosines = images.vectors[block] @ centroids.T
        cosines[np.arange(len(cosines)), images.labels[block]] = -np.inf
        other[block], product[block] = _score_others(cosines, near.scores[block], images, near.rows[block])
    known = ~np.isnan(own)
    average = float(own[known].mean()) if known.any() else 1.0
    totals = np.bincount(images.labels[known], own[known], len(images.counts))
    scored = np.bincount(images.labels[known], minlength=len(images.counts))
    self_confidence = np.where(scored > 0, totals / np.maximum(scored, 1), average)
    confident = (other > own) & (other >= self_confidence[product])
    return LabelScores(rest, own, other, product, confident)


def _score_own_products(images: LabelledVectors) -> tuple[Vectors, Vectors]:
    """Return ``rest`` and ``own`` of :class:`LabelScores`."""
    rest, own = np.full(len(images), np.nan, np.float32), np.full(len(images), np.nan, np.float32)
    for rows, total in zip(images.groups, images.sums, strict=True):
        if len(rows) == 1:
            continue
        vectors = images.vectors[rows]
        others = total - vectors
        products = np.einsum("nd,nd->n", vectors, others)
        rest[rows] = products / (len(rows) - 1)
        centroid = products / np.maximum(np.linalg.norm(others, axis=1), 1e-12)
        count = min(_NEAREST, len(rows) - 1)
        nearest = np.empty(len(rows), np.float32)
        for block in _blocks(len(rows), _BLOCK):
            cosines = vectors[block] @ vectors.T
            cosines[np.arange(len(cosines)), np.arange(block.start, block.stop)] = -np.inf
            nearest[block] = np.partition(cosines, -count, axis=1)[:, -count:].mean(axis=1)
        own[rows] = (centroid + nearest) / 2
    return rest, own


def _score_others(
    cosines: Vectors, near_scores: Vectors, images: LabelledVectors, near_rows: Rows
) -> tuple[Vectors, Rows]:
    """Return similarity and index of the most similar other product of a block of images.

    Args:
        cosines: (block, products) cosines to the centroids, minus infinity for the image's product.
        near_scores: (block, k) cosines to the nearest images.
        images: All images.
        near_rows: (block, k) rows of the nearest images.
    """
    candidates = images.labels[near_rows]
    nearest = _mean_of_nearest(near_scores, candidates, images.counts)
    combined = (np.take_along_axis(cosines, candidates, axis=1) + nearest) / 2
    # No image of the nearest centroid may be in the list; its images are then at most as near as the last one.
    by_centroid = cosines.argmax(axis=1)
    products = np.concatenate([candidates, by_centroid[:, None]], axis=1)
    values = np.concatenate([combined, (cosines.max(axis=1, keepdims=True) + near_scores[:, -1:]) / 2], axis=1)
    best = values.argmax(axis=1)[:, None]
    return np.take_along_axis(values, best, axis=1)[:, 0], np.take_along_axis(products, best, axis=1)[:, 0]


def _mean_of_nearest(scores: Vectors, products: Rows, counts: Rows) -> Vectors:
    """Return for each of (block, k) neighbours the mean cosine of the nearest three images of its product.

    Images of the product beyond the list count as the last one.
    """
    is_same = products[:, :, None] == products[:, None, :]
    is_first = is_same & (np.cumsum(is_same, axis=2, dtype=np.int16) <= _NEAREST)
    needed = np.minimum(_NEAREST, counts[products])
    missing = needed - is_first.sum(axis=2)
    total = np.einsum("bij,bj->bi", is_first.astype(np.float32), scores)
    return ((total + missing * scores[:, -1:]) / needed).astype(np.float32)


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
