"""Other ways to look at the same embeddings: by category, after re-ranking, against the teacher's gallery."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr.data.catalog import Catalog
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.metrics import RetrievalScores, bootstrap_interval, evaluate, evaluate_similarities
from vpr.retrieval.rerank import similarities, transform

Vectors = NDArray[np.float32]


def metrics_dict(scores: RetrievalScores) -> dict[str, Any]:
    """Scores as fields of ``report.json``."""
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "map", "map_at_1000")
    return {**{name: getattr(scores, name) for name in names}, "ci95": list(scores.ci95)}


def by_category(part: Catalog, hits: NDArray[np.bool_], seed: int) -> dict[str, Any] | None:
    """Recall@1 of the queries of each category, those with most queries first; None without categories."""
    categories = part.categories[part.roles == "query"]
    names, counts = np.unique(categories[categories != ""], return_counts=True)
    if not len(names):
        return None
    found = {}
    for name in names[np.argsort(-counts, kind="stable")]:
        own = hits[categories == name]
        found[str(name)] = {
            "queries": len(own),
            "recall_at_1": float(own.mean()),
            "ci95": list(bootstrap_interval(own, seed)),
        }
    return found


def reranked(part: Catalog, vectors: Vectors, steps: RerankConfig, seed: int) -> dict[str, Any] | None:
    """Scores after the steps of :mod:`vpr.retrieval.rerank`; None if there are none."""
    if steps == RerankConfig():
        return None
    query, gallery = part.roles == "query", part.roles == "gallery"
    products = part.products[query], part.products[gallery]
    if steps.k_reciprocal:
        scores = similarities(vectors[query], vectors[gallery], steps)
        return metrics_dict(evaluate_similarities(scores, *products, seed))
    asked, shown = transform(vectors[query], vectors[gallery], steps)
    return metrics_dict(evaluate(asked, products[0], shown, products[1], seed))


def asymmetric(part: Catalog, vectors: Vectors, teacher: Vectors, seed: int) -> dict[str, Any] | None:
    """Scores of a model's queries in the teacher's gallery; None where the dimensions differ.

    A gallery embedded once by the teacher then serves queries of the student (Budnik and Avrithis, "Asymmetric
    metric learning for knowledge transfer", CVPR 2021).
    """
    if vectors.shape[1] != teacher.shape[1]:
        return None
    query, gallery = part.roles == "query", part.roles == "gallery"
    found = evaluate(vectors[query], part.products[query], teacher[gallery], part.products[gallery], seed)
    return metrics_dict(found)
