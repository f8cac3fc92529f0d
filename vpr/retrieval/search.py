"""Exact nearest-neighbour search by inner product (cosine, for L2-normalised vectors)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError


def search(
    query_vectors: NDArray[np.float32], gallery_vectors: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The ``k`` gallery vectors of largest inner product with each query, best first.

    Args:
        query_vectors: (queries, dim) float32.
        gallery_vectors: (gallery, dim) float32.
        k: results per query; at most the size of the gallery.

    Returns:
        scores (queries, k) float32 and gallery rows (queries, k) int64.

    Raises:
        UserError: ``k`` out of range or dimensions that differ.
    """
    import faiss

    if not 1 <= k <= len(gallery_vectors):
        raise UserError(f"search: k is {k}, the gallery has {len(gallery_vectors)} images: choose 1 to that many")
    if query_vectors.shape[1] != gallery_vectors.shape[1]:
        raise UserError(
            f"search: queries have {query_vectors.shape[1]} dimensions, the gallery {gallery_vectors.shape[1]}: "
            "embed both with the same model"
        )
    # Without an index the gallery is not copied, which for a million vectors takes as long as many a search.
    query, gallery = (np.ascontiguousarray(some, dtype=np.float32) for some in (query_vectors, gallery_vectors))
    scores, rows = faiss.knn(query, gallery, k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows
