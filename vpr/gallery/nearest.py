"""Nearest images of queries in a version of a gallery: exact over all images, or by the index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.gallery.gallery import vectors_of
from vpr.gallery.store import ROW_ID, RowIds, Snapshot, Vectors
from vpr.retrieval.open_set import BestProducts

Scores = NDArray[np.float32]
log = get_logger(__name__)

_FIRST_K = 16  # images in which a second product is looked for first


@dataclass(frozen=True)
class Nearest:
    """Nearest images of queries, best first.

    Attributes:
        scores: (queries, k) float32 cosines; minus infinity where there are fewer images.
        rows: (queries, k) uint64 row ids of the version.
    """

    scores: Scores
    rows: RowIds

    @property
    def found(self) -> NDArray[np.bool_]:
        """Which of the (queries, k) places have an image."""
        return np.isfinite(self.scores)


def usable_probes(snapshot: Snapshot, probes: int) -> int:
    """Return the probes of a search in a version: 0, with a warning, until the version's index is built.

    Another process writes the images of an indexed gallery first and builds the index then. A kill between the two
    leaves the version without its index, as do fewer images than partitions.

    Raises:
        UserError: The gallery was never indexed.
    """
    if not probes or snapshot.index() is not None:
        return probes
    if not snapshot.partitions:
        raise UserError(
            "probes: the gallery has no index. Run `vpr gallery compact --index 256`, or leave out --probes."
        )
    problem = f"the index of version {snapshot.version} is not built yet, so all images are compared"
    log.warning(f"probes: {problem}. If no other process builds it, run `vpr gallery compact`.")
    return 0


def find_nearest(snapshot: Snapshot, queries: Vectors, k: int, where: str = "", probes: int = 0) -> Nearest:
    """Search (queries, dim) float32 unit vectors.

    Args:
        snapshot: Version to search.
        queries: Query vectors.
        k: Images per query.
        where: Condition in SQL.
        probes: Partitions of the index to search, of :func:`usable_probes`; 0 reads all images once, and keeps the best
            of each query.

    Raises:
        UserError: The condition is invalid.
    """
    if not probes:
        return _find_exact(snapshot, queries, k, where)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.zeros((len(queries), k), dtype=np.uint64)
    for number, query in enumerate(queries):
        best, ids = snapshot.probe(query, k, probes, where)
        scores[number, : len(best)], rows[number, : len(ids)] = best, ids
    return Nearest(scores, rows)


def _find_exact(snapshot: Snapshot, queries: Vectors, k: int, where: str) -> Nearest:
    """Compare all queries with each part of the images; memory is that of one part and of the results."""
    import faiss

    queries = np.ascontiguousarray(queries, dtype=np.float32)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.zeros((len(queries), k), dtype=np.uint64)
    for batch in snapshot.batches(["vector"], where):
        if not batch.num_rows:
            continue
        vectors, ids = np.ascontiguousarray(vectors_of(batch)), batch[ROW_ID].to_numpy()
        new, index = faiss.knn(queries, vectors, min(k, len(ids)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = np.concatenate([scores, new], axis=1), np.concatenate([rows, ids[index]], axis=1)
        order = np.lexsort((rows, -scores))[:, :k]
        scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return Nearest(scores, rows)


def find_best(snapshot: Snapshot, queries: Vectors, where: str = "", probes: int = 0) -> BestProducts:
    """Return the best image of each query and the margin to the best image of another product.

    A condition limits the best image only: the margin is that to other products of the version, also to those that the
    condition excludes, and may be negative. So similarity and margin are at most those without the condition, and a
    threshold on them answers no query that it does not answer without it. A margin within the fulfilling images would
    be larger, and the bound on false accepts would not hold.

    ``rows`` of the result are positions of the queries. A query without a second product has the margin to -1, the
    lowest cosine. One without any image has the similarity -1 and no margin.
    """
    k, count = _FIRST_K, max(len(snapshot), 1)
    nearest = find_nearest(snapshot, queries, min(k, count), probes=probes)
    chosen = find_nearest(snapshot, queries, 1, where, probes) if where else nearest
    has_best, own = chosen.found[:, 0], _products(snapshot, chosen)[:, :1]
    best = np.where(has_best, chosen.scores[:, 0].astype(np.float64), -1.0)
    second, pending = np.full(len(queries), -1.0), np.arange(len(queries))
    while True:
        is_other = nearest.found & (_products(snapshot, nearest) != own[pending])
        has_other, column = is_other.any(axis=1), is_other.argmax(axis=1)
        second[pending[has_other]] = nearest.scores[has_other, column[has_other]]
        pending = pending[~(has_other | ~nearest.found[:, -1] | (k >= count))]
        if not len(pending):
            return BestProducts(np.arange(len(queries)), best, np.where(has_best, best - second, 0.0))
        k = 4 * k
        nearest = find_nearest(snapshot, queries[pending], min(k, count), probes=probes)


def _products(snapshot: Snapshot, nearest: Nearest) -> NDArray[np.object_]:
    """Return the (queries, k) products; None where there are fewer images."""
    products = np.full(nearest.rows.shape, None, dtype=object)
    names = snapshot.take(nearest.rows[nearest.found], ["product"])["product"].to_pylist()
    products[nearest.found] = np.array(names, dtype=object)
    return products
