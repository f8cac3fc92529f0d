"""Suspicious images and products of a labelled catalogue, found in its embeddings. Arrays only, no files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.retrieval.label_scores import (
    LabelledVectors,
    LabelScores,
    Neighbours,
    Rows,
    Vectors,
    find_neighbours,
    score_labels,
)

Kind = Literal["wrong-label", "outlier", "duplicate", "merge", "confusable"]
KINDS: tuple[Kind, ...] = ("wrong-label", "outlier", "duplicate", "merge", "confusable")
_DUPLICATE_DISTANCE = 0.05  # of the distance between images of different products: .98 for a mean cosine of .6
_PARTNERS = 5  # products that a product is compared with: those of most of its images' neighbours
_CLOSEST = 10  # neighbours that vote for the partners
_TESTED = 3  # images of the smaller product from which the mixing of two products is tested
_MAX_IMAGES = 64  # images of a product that are compared with a partner's


@dataclass(frozen=True)
class Thresholds:
    """Limits of the findings, see :class:`vpr.retrieval.config.CatalogCheckConfig`."""

    outlier: float | None = None
    duplicate: float | None = None
    merge: float = 0.5
    confusable: float = 0.2


@dataclass(frozen=True)
class Finding:
    """A suspicious image, or an image of a suspicious product.

    Attributes:
        kind: Kind of the finding.
        row: Row of the image.
        other: Row of the image that it is compared with; -1 without one.
        product: Index of the other product; -1 without one.
        score: Larger is more suspicious: excess similarity of ``wrong-label``, cosine of ``duplicate``, overlap of
            ``merge`` and ``confusable``. For ``outlier`` the mean cosine to the product, where smaller is more
            suspicious.
        confident: Whether a change is suggested.
    """

    kind: Kind
    row: int
    other: int
    product: int
    score: float
    confident: bool


@dataclass(frozen=True)
class CheckResult:
    """Findings, most suspicious first within each kind, the label scores of all images, and the limits as cosines."""

    findings: list[Finding]
    scores: LabelScores
    outlier_below: float
    duplicate_from: float


def check_labels(
    images: LabelledVectors,
    thresholds: Thresholds,
    contents: NDArray[np.str_] | None = None,
    scored: NDArray[np.bool_] | None = None,
) -> CheckResult:
    """Find suspicious images and products.

    Args:
        images: Embeddings and products.
        thresholds: Limits of the findings.
        contents: (n,) checksums of the image files; equal files of different products are duplicates.
        scored: (n,) mask of images of scored splits; a duplicate names the training image first.

    Raises:
        UserError: There are fewer than two products.
    """
    if len(images.counts) < 2:
        raise UserError("embeddings: there is only one product. Embed a catalogue of two products or more.")
    near = find_neighbours(images.vectors)
    scores = score_labels(images, near)
    below = images.chance if thresholds.outlier is None else thresholds.outlier
    limit = 1 - _DUPLICATE_DISTANCE * (1 - images.chance) if thresholds.duplicate is None else thresholds.duplicate
    fit = np.nan_to_num(scores.own, nan=1)  # the only image of a product has no score: it stays
    if scored is not None:
        fit[scored] = np.inf
    findings = [
        *_find_wrong_labels(images, scores),
        *_find_outliers(scores, below),
        *_find_duplicates(images, near, fit, limit, contents),
        *_find_similar_products(images, near, thresholds),
    ]
    return CheckResult(findings, scores, below, limit)


def _find_wrong_labels(images: LabelledVectors, scores: LabelScores) -> Iterator[Finding]:
    """Yield images that are more similar to another product, the largest excess first."""
    excess = scores.other - scores.own
    rows = np.flatnonzero(excess > 0)
    for row in rows[np.argsort(-excess[rows], kind="stable")].tolist():
        product = int(scores.product[row])
        members = images.groups[product]
        other = int(members[(images.vectors[members] @ images.vectors[row]).argmax()])
        yield Finding("wrong-label", row, other, product, float(excess[row]), bool(scores.confident[row]))


def _find_outliers(scores: LabelScores, below: float) -> Iterator[Finding]:
    """Yield images that do not look like the other images of their product, the least similar first."""
    rows = np.flatnonzero(scores.rest < below)
    for row in rows[np.argsort(scores.rest[rows], kind="stable")].tolist():
        yield Finding("outlier", row, -1, -1, float(scores.rest[row]), True)


def _find_duplicates(
    images: LabelledVectors, near: Neighbours, fit: Vectors, limit: float, contents: NDArray[np.str_] | None
) -> Iterator[Finding]:
    """Yield pairs of nearly equal images of different products; the image that fits its product less is first."""
    rows, columns = np.nonzero((near.scores >= limit) & (images.labels[near.rows] != images.labels[:, None]))
    pairs = np.stack([rows, near.rows[rows, columns]], axis=1)
    if contents is not None:
        pairs = np.concatenate([pairs, _same_contents(contents, images.labels)])
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    cosines = np.einsum("nd,nd->n", images.vectors[pairs[:, 0]], images.vectors[pairs[:, 1]])
    for index in np.argsort(-cosines, kind="stable").tolist():
        first, second = pairs[index].tolist()
        if fit[second] < fit[first]:
            first, second = second, first
        yield Finding("duplicate", first, second, int(images.labels[second]), float(cosines[index]), True)


def _same_contents(contents: NDArray[np.str_], labels: Rows) -> Rows:
    """Return (pairs, 2) rows of equal files of different products: each file and the first one with its contents."""
    _, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
    later = np.flatnonzero(labels != labels[first[inverse]])
    return np.stack([later, first[inverse][later]], axis=1)


def _find_similar_products(images: LabelledVectors, near: Neighbours, limits: Thresholds) -> Iterator[Finding]:
    """Yield pairs of products that look the same (``merge``) or alike (``confusable``), most similar first."""
    within = _mean_within(images)
    found = []
    for first, second in _candidate_pairs(images, near).tolist():
        smaller, larger = sorted((first, second), key=lambda product: int(images.counts[product]))
        rows, partners = _sample(images.groups[smaller]), _sample(images.groups[larger])
        cosines = images.vectors[rows] @ images.vectors[partners].T
        typical = (within[smaller] + within[larger]) / 2
        closeness = (float(cosines.mean()) - images.chance) / max(typical - images.chance, 1e-6)
        if len(rows) < _TESTED:  # too few to test: they must be as near as images of one product
            overlap = float(closeness >= 1)
        elif (overlap := min(1.0, closeness)) >= limits.confusable:
            overlap = min(overlap, _mixing(images.vectors[rows], images.vectors[partners], cosines))
        if overlap >= limits.confusable:
            row, partner = np.unravel_index(cosines.argmax(), cosines.shape)
            kind: Kind = "merge" if overlap >= limits.merge else "confusable"
            found.append(Finding(kind, int(rows[row]), int(partners[partner]), larger, float(overlap), kind == "merge"))
    # Kinds follow each other, as a merge has the larger overlap.
    yield from sorted(found, key=lambda finding: -finding.score)


def _mean_within(images: LabelledVectors) -> NDArray[np.float64]:
    """Return each product's mean cosine of two of its images; the median of all for products of one image."""
    counts = images.counts.astype(np.float64)
    squares = np.square(images.sums, dtype=np.float64).sum(axis=1)
    within = (squares - counts) / np.maximum(counts * (counts - 1), 1)
    known = counts > 1
    return np.where(known, within, np.median(within[known]) if known.any() else 1.0)


def _candidate_pairs(images: LabelledVectors, near: Neighbours) -> Rows:
    """Return (pairs, 2) products, each with the other products of most neighbours of its images."""
    products = len(images.counts)
    partners = images.labels[near.rows[:, :_CLOSEST]]
    labels = np.broadcast_to(images.labels[:, None], partners.shape)
    is_other = partners != labels
    codes, votes = np.unique(labels[is_other] * products + partners[is_other], return_counts=True)
    owner = codes // products
    order = np.lexsort((codes, -votes, owner))
    first = np.searchsorted(owner[order], owner[order])
    best = codes[order][np.arange(len(codes)) - first < _PARTNERS]
    return np.unique(np.sort(np.stack([best // products, best % products], axis=1), axis=1), axis=0)


def _mixing(first: Vectors, second: Vectors, across: Vectors) -> float:
    """Return how far the images of two products are mixed: 0 for separate ones, about 1 for one product twice.

    Rate of images with their nearest neighbour in the other product, by the rate of random labels (nearest-neighbour
    two-sample test: Schilling, "Multivariate Two-Sample Tests Based on Nearest Neighbors", JASA 1986).
    """
    observed, expected = 0.0, 0.0
    for vectors, cosines in ((first, across), (second, across.T)):
        inside = vectors @ vectors.T
        np.fill_diagonal(inside, -np.inf)
        observed += np.count_nonzero(cosines.max(axis=1) > inside.max(axis=1))
        expected += len(vectors) * cosines.shape[1] / (len(vectors) + cosines.shape[1] - 1)
    return observed / expected


def _sample(rows: Rows) -> Rows:
    """Return at most :data:`_MAX_IMAGES` rows, evenly spaced."""
    if len(rows) <= _MAX_IMAGES:
        return rows
    return rows[np.linspace(0, len(rows) - 1, _MAX_IMAGES).astype(np.int64)]
