"""Exact nearest-neighbour search by inner product (cosine, for L2-normalised vectors)."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError

_Value = TypeVar("_Value", bound=np.generic)


def check_k(k: int, gallery_size: int) -> None:
    """Raise :class:`UserError` if the gallery has fewer than ``k`` images."""
    if not 1 <= k <= gallery_size:
        raise UserError(f"k: expected 1 to {gallery_size} (the size of the gallery), got {k}.")


def search(
    query_vectors: NDArray[np.float32], gallery_vectors: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the ``k`` gallery vectors with the largest inner product for each query, best first.

    Equal products are returned in the order of the gallery, as :func:`vpr.retrieval.metrics.evaluate` ranks them.
    Queries and gallery are (n, dim) float32; the result is (queries, k) float32 scores and int64 gallery rows.

    Raises:
        UserError: ``k`` is out of range, the dimensions differ, or a vector is not finite.
    """
    import faiss

    check_k(k, len(gallery_vectors))
    dim, gallery_dim = query_vectors.shape[1], gallery_vectors.shape[1]
    if dim != gallery_dim:
        raise UserError(f"search: queries have {dim} dimensions, the gallery {gallery_dim}. Embed both with one model.")
    # A sum is finite only if all values are, and takes no memory. faiss returns row -1 for such a query.
    if not all(np.isfinite(vectors.sum(dtype=np.float64)) for vectors in (query_vectors, gallery_vectors)):
        raise UserError("search: the embeddings contain NaN or infinity. Check the model with `vpr export parity`.")
    # An index would copy the gallery, which costs as much as many searches at a million vectors.
    query, gallery = (np.ascontiguousarray(vectors, dtype=np.float32) for vectors in (query_vectors, gallery_vectors))
    scores, rows = faiss.knn(query, gallery, min(k + 1, len(gallery)), metric=faiss.METRIC_INNER_PRODUCT)
    order = np.lexsort((rows, -scores))
    scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    # faiss keeps any of the equally near rows where its list ends.
    for index in np.flatnonzero(scores[:, k - 1] == scores[:, -1]) if k < len(gallery) else ():
        rows[index, :k] = nearest_rows(gallery @ query[index], k)
    return np.ascontiguousarray(scores[:, :k]), np.ascontiguousarray(rows[:, :k])


def search_others(
    query_vectors: NDArray[np.float32], gallery_vectors: NDArray[np.float32], k: int, own: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search like :func:`search` without each query's own image, the (queries,) gallery rows ``own``.

    A query that is not in the gallery has -1.
    """
    check_k(k, len(gallery_vectors) - 1)
    scores, rows = search(query_vectors, gallery_vectors, k + 1)
    return drop_own(scores, rows, own), drop_own(rows, rows, own)


def drop_own(values: NDArray[_Value], rows: NDArray[np.int64], own: NDArray[np.int64]) -> NDArray[_Value]:
    """Return (queries, k - 1) of (queries, k) values of results without that of each query's own image.

    ``rows`` are the (queries, k) gallery rows of the results, -1 for no result, and ``own`` the (queries,) rows of
    the own images, -1 for none. Where the own image is not among the results, the last one is left out.
    """
    is_other = (rows != own[:, None]) | (own < 0)[:, None]
    is_other[is_other.all(axis=1), -1] = False
    return values[is_other].reshape(len(rows), rows.shape[1] - 1)


def nearest_rows(similarities: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the ``k`` nearest rows of one query's (gallery,) similarities, equal ones in the order of the gallery."""
    candidates = np.flatnonzero(similarities >= np.partition(similarities, -k)[-k])
    return candidates[np.argsort(-similarities[candidates], kind="stable")[:k]]
