"""More scores of the same embeddings: by category, after re-ranking, and in the teacher's gallery."""

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.schema import Category, Retrieval
from vpr.data.catalog import Catalog
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.intervals import mean_interval
from vpr.retrieval.metrics import RetrievalScores, evaluate, evaluate_similarities
from vpr.retrieval.rerank import similarities, transform

Vectors = NDArray[np.float32]


def score_categories(part: Catalog, hits: NDArray[np.bool_], seed: int) -> dict[str, Category] | None:
    """Return recall@1 by category from (queries,) bool hits, most queries first; None without categories."""
    is_query = part.roles == "query"
    categories, products = part.categories[is_query], part.products[is_query]
    names, counts = np.unique(categories[categories != ""], return_counts=True)
    if not len(names):
        return None
    scores = {}
    for name in names[np.argsort(-counts, kind="stable")]:
        rows = categories == name
        scores[str(name)] = Category(
            queries=int(rows.sum()),
            products=len(np.unique(products[rows])),
            recall_at_1=float(hits[rows].mean()),
            ci95=mean_interval(hits[rows], products[rows], seed=seed),
        )
    return scores


def score_reranked(part: Catalog, vectors: Vectors, steps: RerankConfig, seed: int) -> Retrieval | None:
    """Return the scores after the steps of :mod:`vpr.retrieval.rerank`; None without steps."""
    if steps == RerankConfig():
        return None
    query, gallery = part.roles == "query", part.roles == "gallery"
    products = part.products[query], part.products[gallery]
    if steps.k_reciprocal:
        scores = similarities(vectors[query], vectors[gallery], steps)
        return _to_retrieval(evaluate_similarities(scores, *products, seed))
    query_rows, gallery_rows = transform(vectors[query], vectors[gallery], steps)
    return _to_retrieval(evaluate(query_rows, products[0], gallery_rows, products[1], seed))


def score_asymmetric(
    part: Catalog, vectors: Vectors, teacher: Vectors, seed: int, own: NDArray[np.int64] | None = None
) -> Retrieval | None:
    """Return the scores of a model's queries in the teacher's gallery; None where the dimensions differ.

    ``own`` is the (queries,) gallery row of each query's own image, which is no result of that query.

    A gallery embedded once by the teacher then serves queries of the student (Budnik and Avrithis, "Asymmetric
    metric learning for knowledge transfer", CVPR 2021).
    """
    if vectors.shape[1] != teacher.shape[1]:
        return None
    query, gallery = part.roles == "query", part.roles == "gallery"
    scores = evaluate(vectors[query], part.products[query], teacher[gallery], part.products[gallery], seed, own)
    return _to_retrieval(scores)


def _to_retrieval(scores: RetrievalScores) -> Retrieval:
    return Retrieval(**{name: getattr(scores, name) for name in Retrieval.model_fields})
