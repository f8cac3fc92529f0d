"""Comparison of a model with the FP32 student, query by query, and the interval of the difference."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.schema import Changed, Interval
from export.parity import parity
from vpr.data.catalog import Catalog
from vpr.retrieval.metrics import bootstrap_interval
from vpr.retrieval.search import search

_TOP = 10


@dataclass(frozen=True)
class RecallDrop:
    """Recall@1 lost on the same queries.

    Attributes:
        mean: Lost share of queries.
        ci95: 95 % interval of the paired bootstrap.
    """

    mean: float
    ci95: Interval


@dataclass(frozen=True)
class ChangedQuery:
    """A query whose first result differs from the FP32 student's: a line of ``changed.csv``.

    Attributes:
        model: Name of the compared artifact.
        backend: Name of its backend.
        query: Image of the query.
        product: Product of the query.
        first_before: First image that the FP32 student finds.
        product_before: Product of that image.
        right_before: 1 if that product is the query's, else 0.
        first_after: First image that the compared model finds.
        product_after: Product of that image.
        right_after: 1 if that product is the query's, else 0.
    """

    model: str
    backend: str
    query: str
    product: str
    first_before: str
    product_before: str
    right_before: int
    first_after: str
    product_after: str
    right_after: int


@dataclass(frozen=True)
class ReferenceDifference:
    """Differences between a model's embeddings and the FP32 student's.

    Attributes:
        cosine_mean: Mean cosine over images; None where the dimensions differ.
        cosine_min: Smallest cosine over images; None where the dimensions differ.
        top10_overlap: Mean share of the first ten results that both models find.
        changed: Queries whose first result differs.
    """

    cosine_mean: float | None
    cosine_min: float | None
    top10_overlap: float
    changed: list[ChangedQuery]

    @property
    def first_changed(self) -> Changed:
        """Counts of the changed queries."""
        return Changed(
            queries=len(self.changed),
            right=sum(query.right_after > query.right_before for query in self.changed),
            wrong=sum(query.right_after < query.right_before for query in self.changed),
        )


def compute_recall_drop(before: str, after: str, seed: int) -> RecallDrop:
    """Return the recall@1 lost on the same queries, with the interval of the paired bootstrap.

    Args:
        before: ``hits`` of a row, a 0 or 1 for each query.
        after: ``hits`` of another row.
        seed: Seed of the bootstrap.
    """
    lost = np.array([int(a) - int(b) for a, b in zip(before, after, strict=True)], dtype=np.float64)
    return RecallDrop(float(lost.mean()), bootstrap_interval(lost, seed))


def compare_with_reference(
    part: Catalog, reference: NDArray[np.float32], vectors: NDArray[np.float32], model: str, backend: str
) -> ReferenceDifference:
    """Compare a model's embeddings of a split with the FP32 student's.

    Args:
        part: Scored split.
        reference: (n, dim) float32, embeddings of the FP32 student.
        vectors: (n, any dim) float32, embeddings of the compared model.
        model: Name of the compared artifact.
        backend: Name of its backend.
    """
    before, after = _search_top(part, reference), _search_top(part, vectors)
    shared = [len(set(a) & set(b)) / len(a) for a, b in zip(before, after, strict=True)]
    cosines = parity(reference, vectors) if reference.shape[1] == vectors.shape[1] else {}
    return ReferenceDifference(
        cosines.get("cosine_mean"),
        cosines.get("cosine_min"),
        float(np.mean(shared)),
        _changed_queries(part, before[:, 0], after[:, 0], model, backend),
    )


def write_changed(path: Path, changed: Sequence[ChangedQuery]) -> None:
    """Write the queries whose first result changed as CSV, one line for each model and query."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(ChangedQuery)])
        writer.writeheader()
        writer.writerows(map(asdict, changed))


def _search_top(part: Catalog, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the nearest gallery rows, best first: (queries, 10 or the size of the gallery)."""
    gallery = vectors[part.roles == "gallery"]
    return search(vectors[part.roles == "query"], gallery, min(_TOP, len(gallery)))[1]


def _changed_queries(
    part: Catalog, before: NDArray[np.int64], after: NDArray[np.int64], model: str, backend: str
) -> list[ChangedQuery]:
    images, products = part.table["image"].to_pylist(), part.products
    queries, gallery = np.flatnonzero(part.roles == "query"), np.flatnonzero(part.roles == "gallery")
    changed = []
    for index in np.flatnonzero(before != after):
        query, old, new = queries[index], gallery[before[index]], gallery[after[index]]
        changed.append(
            ChangedQuery(
                model=model,
                backend=backend,
                query=images[query],
                product=str(products[query]),
                first_before=images[old],
                product_before=str(products[old]),
                right_before=int(products[old] == products[query]),
                first_after=images[new],
                product_after=str(products[new]),
                right_after=int(products[new] == products[query]),
            )
        )
    return changed
