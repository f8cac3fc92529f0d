"""Exact nearest-neighbour search by inner product (cosine, for L2-normalised vectors)."""

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError


def check_k(k: int, gallery_size: int) -> None:
    """Raise :class:`UserError` if the gallery has fewer than ``k`` images."""
    if not 1 <= k <= gallery_size:
        raise UserError(f"k: expected 1 to {gallery_size} (the size of the gallery), got {k}.")


def search(
    query_vectors: NDArray[np.float32], gallery_vectors: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the ``k`` gallery vectors with the largest inner product for each query, best first.

    Queries and gallery are (n, dim) float32; the result is (queries, k) float32 scores and int64 gallery rows.

    Raises:
        UserError: ``k`` is out of range, or the dimensions differ.
    """
    import faiss

    check_k(k, len(gallery_vectors))
    dim, gallery_dim = query_vectors.shape[1], gallery_vectors.shape[1]
    if dim != gallery_dim:
        raise UserError(f"search: queries have {dim} dimensions, the gallery {gallery_dim}. Embed both with one model.")
    # An index would copy the gallery, which costs as much as many searches at a million vectors.
    query, gallery = (np.ascontiguousarray(vectors, dtype=np.float32) for vectors in (query_vectors, gallery_vectors))
    scores, rows = faiss.knn(query, gallery, k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows
