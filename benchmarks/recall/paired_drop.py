"""Comparison of a model with the FP32 student, query by query, and the evidence on the drop of recall@1."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.schema import Changed, Interval
from export.parity import mean_overlap, parity
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.drop_test import drop_test
from vpr.retrieval.intervals import MIN_PRODUCTS, mean_interval, sign_flip_p_value
from vpr.retrieval.search import search, search_others

_TOP = 10


@dataclass(frozen=True)
class RecallDrop:
    """Recall@1 lost on the same queries. With fewer than 10 products, nothing but the mean is known."""

    mean: float  # lost share of queries
    ci95: Interval | None  # 95 % interval, paired, by product
    upper_bound: float | None  # one-sided 95 % upper bound
    p_value: float | None  # p-value of the hypothesis that recall@1 did not change


@dataclass(frozen=True)
class ChangedQuery:
    """A query whose first result differs from the FP32 student's: a line of ``changed.csv``."""

    model: str  # name of the compared artifact
    backend: str  # name of its backend
    query: str  # image of the query
    product: str  # product of the query
    first_before: str  # first image that the FP32 student finds
    product_before: str  # product of that image
    right_before: int  # 1 if that product is the query's, else 0
    first_after: str  # first image that the compared model finds
    product_after: str  # product of that image
    right_after: int  # 1 if that product is the query's, else 0


@dataclass(frozen=True)
class ReferenceDifference:
    """Differences between a model's embeddings and the FP32 student's."""

    cosine_mean: float | None  # mean cosine over images; None where the dimensions differ
    cosine_min: float | None  # smallest cosine over images; None where the dimensions differ
    top10_overlap: float  # mean share of the first ten results that both models find
    changed: list[ChangedQuery]  # queries whose first result differs

    @property
    def first_changed(self) -> Changed:
        """Counts of the changed queries."""
        return Changed(
            queries=len(self.changed),
            right=sum(query.right_after > query.right_before for query in self.changed),
            wrong=sum(query.right_after < query.right_before for query in self.changed),
        )


def compute_recall_drop(before: Mapping[str, str], after: Mapping[str, str], seed: int) -> RecallDrop:
    """Compare the ``hits`` of two rows: one digit per query, by product.

    Raises:
        UserError: The products or their numbers of queries differ.
    """
    if {name: len(hits) for name, hits in before.items()} != {name: len(hits) for name, hits in after.items()}:
        raise UserError("after: the hits are of other products or queries. Score both reports on the same catalogue.")
    # Places in the order of the names: NumPy would store each name with the length of the longest one.
    places = {name: f"{place:09}" for place, name in enumerate(sorted(before))}
    products = np.repeat([places[name] for name in before], [len(hits) for hits in before.values()])
    first, second = (
        np.array([digit == "1" for name in before for digit in hits[name]], dtype=np.bool_) for hits in (before, after)
    )
    lost = first.astype(np.float64) - second
    if len(before) < MIN_PRODUCTS:
        return RecallDrop(float(lost.mean()), None, None, None)
    test = drop_test(first, second, products)
    return RecallDrop(
        float(lost.mean()),
        mean_interval(lost, products, seed=seed, lowest=-1, correlation=test.correlation),
        test.upper_bound(0.95),
        sign_flip_p_value(lost, products, seed),
    )


def compare_with_reference(
    part: Catalog,
    reference: NDArray[np.float32],
    vectors: NDArray[np.float32],
    model: str,
    backend: str,
    own: NDArray[np.int64] | None = None,
) -> ReferenceDifference:
    """Compare a model's embeddings of a split, (n, any dim) float32, with the FP32 student's, (n, dim) float32.

    ``own`` is the (queries,) gallery row of each query's own image, which is no result of that query.
    """
    before, after = _search_top(part, reference, own), _search_top(part, vectors, own)
    cosines = parity(reference, vectors) if reference.shape[1] == vectors.shape[1] else {}
    changed = _changed_queries(part, before[:, 0], after[:, 0], model, backend)
    return ReferenceDifference(
        cosines.get("cosine_mean"), cosines.get("cosine_min"), mean_overlap(before, after), changed
    )


def write_changed(path: Path, changed: Sequence[ChangedQuery]) -> None:
    """Write the queries whose first result changed as CSV, one line for each model and query."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(ChangedQuery)])
        writer.writeheader()
        writer.writerows(map(asdict, changed))


def _search_top(part: Catalog, vectors: NDArray[np.float32], own: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return the nearest gallery rows, best first: (queries, 10 or the size of the gallery)."""
    queries, gallery = vectors[part.roles == "query"], vectors[part.roles == "gallery"]
    if own is not None:
        return search_others(queries, gallery, min(_TOP, len(gallery) - 1), own)[1]
    return search(queries, gallery, min(_TOP, len(gallery)))[1]


def _changed_queries(
    part: Catalog, before: NDArray[np.int64], after: NDArray[np.int64], model: str, backend: str
) -> list[ChangedQuery]:
    images, products = part.table["image"].to_pylist(), part.products
    queries, gallery = np.flatnonzero(part.roles == "query"), np.flatnonzero(part.roles == "gallery")
    changed = []
    for index in np.flatnonzero(before != after):
        query, first = queries[index], (gallery[before[index]], gallery[after[index]])
        old, new = ((images[row], str(products[row]), int(products[row] == products[query])) for row in first)
        changed.append(ChangedQuery(model, backend, images[query], str(products[query]), *old, *new))
    return changed
