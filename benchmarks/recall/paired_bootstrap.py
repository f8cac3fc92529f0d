"""A model against the FP32 student, query by query: what it changed, and whether that is more than chance."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.parity import parity
from vpr.data.catalog import Catalog
from vpr.retrieval.metrics import bootstrap_interval
from vpr.retrieval.search import search

_TOP = 10
COLUMNS = (
    *("model", "backend", "query", "product"),
    *("first_before", "product_before", "right_before", "first_after", "product_after", "right_after"),
)


def top_hits(part: Catalog, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """(queries, 10 or the gallery's size) places in the gallery, best first."""
    gallery = vectors[part.roles == "gallery"]
    return search(vectors[part.roles == "query"], gallery, min(_TOP, len(gallery)))[1]


def recall_drop(before: str, after: str, seed: int) -> dict[str, Any]:
    """Recall@1 lost on the same queries, with the 95 % interval of the paired bootstrap.

    Args:
        before: ``hits`` of a row, a 0 or 1 for each query.
        after: those of another row.
        seed: of the bootstrap.
    """
    lost = np.array([int(a) - int(b) for a, b in zip(before, after, strict=True)], dtype=np.float64)
    return {"recall_drop": float(lost.mean()), "recall_drop_ci95": list(bootstrap_interval(lost, seed))}


def compare_with_reference(
    part: Catalog, reference: NDArray[np.float32], vectors: NDArray[np.float32]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare embeddings of a split with the FP32 student's.

    Returns:
        ``cosine_mean`` and ``cosine_min`` (None where the dimensions differ), ``top10_overlap`` and ``first_changed``
        (queries with another first result, and how many of them it put ``right`` or ``wrong``); and those queries in
        the form of :data:`COLUMNS`.
    """
    before, after = top_hits(part, reference), top_hits(part, vectors)
    shared = [len(set(a) & set(b)) / len(a) for a, b in zip(before, after, strict=True)]
    changed = _changed(part, before[:, 0], after[:, 0])
    same = reference.shape[1] == vectors.shape[1]
    cosine = parity(reference, vectors) if same else {"cosine_mean": None, "cosine_min": None}
    return {
        "cosine_mean": cosine["cosine_mean"],
        "cosine_min": cosine["cosine_min"],
        "top10_overlap": float(np.mean(shared)),
        "first_changed": {
            "queries": len(changed),
            "right": sum(one["right_after"] > one["right_before"] for one in changed),
            "wrong": sum(one["right_after"] < one["right_before"] for one in changed),
        },
    }, changed


def write_changed(path: Path, changed: Sequence[dict[str, Any]]) -> None:
    """Write the queries whose first result changed as CSV, one line for each model and query."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(changed)


def _changed(part: Catalog, before: NDArray[np.int64], after: NDArray[np.int64]) -> list[dict[str, Any]]:
    images, products = part.table["image"].to_pylist(), part.products
    queries, gallery = np.flatnonzero(part.roles == "query"), np.flatnonzero(part.roles == "gallery")
    found = []
    for place in np.flatnonzero(before != after):
        query, old, new = queries[place], gallery[before[place]], gallery[after[place]]
        found.append(
            {
                "query": images[query],
                "product": str(products[query]),
                "first_before": images[old],
                "product_before": str(products[old]),
                "right_before": int(products[old] == products[query]),
                "first_after": images[new],
                "product_after": str(products[new]),
                "right_after": int(products[new] == products[query]),
            }
        )
    return found
