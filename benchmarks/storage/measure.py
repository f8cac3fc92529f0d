"""Bytes, time and hits of every storage setting in one gallery."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.config import StorageConfig
from benchmarks.report.storage_schema import StorageRow
from benchmarks.storage.gallery import Gallery, StorageData
from export.backends.registry import default_threads
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.retrieval.config import INDEX_KINDS, VECTOR_FORMATS
from vpr.retrieval.confirmed_storage import RESULTS
from vpr.retrieval.intervals import mean_interval
from vpr.retrieval.search import drop_own, search, search_others
from vpr.retrieval.vector_index import (
    StorageSetting,
    Vectors,
    build_reduced,
    find_problem,
    fit_reduction,
    is_possible,
    join,
    measure_bytes,
    reduce_vectors,
)

log = get_logger(__name__)

TOP = RESULTS
_TIE = 1e-5  # float32 sums in a different order differ by less than this
# 1,000 queries in 20,000 vectors of 256 dimensions: 0.992 of the first results were exact with the queries in the
# graph, and 0.977 in a graph without them (64 candidates).
_LINKED = (
    "indexes: hnsw links each query's own image to its neighbours, so its losses cannot be measured where the queries "
    "are gallery images. Leave hnsw out of --indexes, or set other images as queries."
)
_SHARES = (1, 2, 4, 8)  # of the dimensions, kept if none are given
Hits = NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """A setting in one gallery, and what the choice needs of it.

    Attributes:
        setting: Setting of the index.
        row: Its row of the table.
        hits: (q,) bool, whether the first result has the query's product.
        neighbours: (q,) float64, share of the exact ten nearest images that are found.
    """

    setting: StorageSetting
    row: StorageRow
    hits: Hits
    neighbours: NDArray[np.float64]


@dataclass(frozen=True)
class Exact:
    """Exact float32 search in one gallery.

    Attributes:
        hits: (q,) bool, whether the reference model finds the product.
        scores: (q, 10) float32, inner products of the nearest images of the stored model, largest first.
    """

    hits: Hits
    scores: Vectors


def list_settings(
    config: StorageConfig, width: int, training: int, is_self_search: bool = False
) -> list[StorageSetting]:
    """Return the settings to measure, the exact one first.

    Settings that cannot be measured where queries are in the gallery (``is_self_search``) are left out.

    Raises:
        UserError: A given format, index or number of dimensions cannot be fitted or measured, or no index has a given
            format.
    """
    dims = config.dims or tuple(dict.fromkeys(max(1, width // share) for share in _SHARES))
    settings = [StorageSetting(width, None, "float32", "flat")]
    for name in config.formats or VECTOR_FORMATS:
        indexes = [index for index in config.indexes or INDEX_KINDS if is_possible(name, index)]
        if config.formats and not indexes:
            raise UserError(f"formats: no index of {list(config.indexes)} stores {name}. Add flat to --indexes.")
        for kept, index in itertools.product(dims, indexes):
            rescoring = config.rescoring if "shortlist" in index else None
            for reduction in (None,) if kept == width else config.reductions:
                settings.append(StorageSetting(kept, reduction, name, index, rescoring))
    possible = []
    for setting in dict.fromkeys(settings):
        problem = find_problem(setting, width, training)
        if not problem and is_self_search and setting.index == "hnsw":
            problem = _LINKED
        if not problem:
            possible.append(setting)
        elif getattr(config, problem.partition(":")[0]):  # the user has set the key
            raise UserError(problem)
        else:
            log.info(f"  left out: {setting.name} ({problem})")
    return possible


def search_exactly(data: StorageData, gallery: Gallery) -> Exact:
    """Search both models' vectors exactly."""
    scores, rows = _search_exactly(data.model.queries, gallery.vectors, TOP, data.own)
    if data.reference is not data.model:
        rows = _search_exactly(data.reference.queries, gallery.reference, 1, data.own)[1]
    return Exact(gallery.codes[rows[:, 0]] == data.query_codes, scores)


def _search_exactly(
    queries: Vectors, vectors: Vectors, count: int, own: NDArray[np.int64] | None
) -> tuple[Vectors, NDArray[np.int64]]:
    return search(queries, vectors, count) if own is None else search_others(queries, vectors, count, own)


def measure_settings(
    config: StorageConfig,
    settings: Sequence[StorageSetting],
    data: StorageData,
    gallery: Gallery,
    exact: Exact,
    smaller: Mapping[str, StorageRow],
    ruled_out: Mapping[str, str],
) -> Iterator[Measured | StorageRow]:
    """Yield each setting as soon as it is measured, or only its row if it is ruled out or would take too long to build.

    ``smaller`` has the last measured rows of smaller galleries by name, from which the seconds are estimated.
    ``ruled_out`` has the reasons of the settings to leave out by name. The exact setting is always measured.
    """
    size, reduced = len(gallery.vectors), _Reduced(data, gallery)
    for setting in sorted(settings, key=lambda setting: (setting.dims, str(setting.reduction), setting.is_rotated)):
        expected, notes = _expected_seconds(smaller.get(setting.name), size), ruled_out.get(setting.name, "")
        if expected > config.build_seconds:
            notes = notes or f"not built: expected {expected:.0f} s, above --build-seconds"
        if notes and setting != settings[0]:  # others are compared with the exact one
            yield StorageRow(size=size, name=setting.name, **asdict(setting), notes=notes)
        else:
            yield _measure(config, setting, data, gallery, exact, reduced)


def _expected_seconds(smaller: StorageRow | None, size: int) -> float:
    if smaller is None or smaller.build_seconds is None:
        return 0.0
    return smaller.build_seconds * size / smaller.size


class _Reduced:
    """Vectors of a gallery in fewer dimensions; those of the last reduction are kept for the next setting."""

    def __init__(self, data: StorageData, gallery: Gallery) -> None:
        self._data, self._gallery = data, gallery
        self._key: tuple[object, ...] = ()

    def get(self, setting: StorageSetting) -> tuple[list[Any], Vectors, Vectors]:
        """Return the transforms, and reduced training and gallery vectors."""
        key = (setting.dims, setting.reduction, setting.is_rotated)
        if key != self._key:
            self._transforms = fit_reduction(setting, self._data.model.training)
            self._training = reduce_vectors(self._transforms, self._data.model.training)
            self._vectors = reduce_vectors(self._transforms, self._gallery.vectors)
            self._key = key
        return self._transforms, self._training, self._vectors


def _measure(
    config: StorageConfig,
    setting: StorageSetting,
    data: StorageData,
    gallery: Gallery,
    exact: Exact,
    reduced: _Reduced,
) -> Measured:
    import faiss

    threads, queries = config.threads or default_threads(), data.model.queries
    transforms, training, vectors = reduced.get(setting)
    faiss.omp_set_num_threads(default_threads())
    start = time.perf_counter()
    stored = build_reduced(setting, training, vectors, config.tuning)
    index = join(transforms, stored)
    seconds = time.perf_counter() - start
    faiss.omp_set_num_threads(threads)
    count = TOP
    if data.own is not None:  # one result more, as the own image is none
        count += 1
        if setting.rescoring:  # rounded down by faiss
            stored.k_factor = (config.tuning.shortlist + 1.5) / count
    found, batches = time_search(index, queries, config.batch, None, count)
    if data.own is not None:
        found = drop_own(found, found, data.own)
    singles = time_search(index, queries, 1, config.seconds, count)[1]
    faiss.omp_set_num_threads(default_threads())
    hits = (found[:, 0] >= 0) & (gallery.codes[found[:, 0]] == data.query_codes)
    neighbours = found_neighbours(queries, gallery.vectors, found, exact.scores)
    scored = ~data.is_choice
    row = StorageRow(
        size=len(gallery.vectors),
        name=setting.name,
        **asdict(setting),
        bytes_per_vector=measure_bytes(index) / len(gallery.vectors),
        build_seconds=seconds,
        single_ms=float(np.median(singles)),
        batch_ms=float(np.median(batches)),
        recall_at_1=float(hits[scored].mean()),
        ci95=mean_interval(hits[scored], data.query_products[scored], seed=config.seed),
        drop=float(exact.hits[scored].mean() - hits[scored].mean()),
        neighbours=float(neighbours[scored].mean()),
    )
    return Measured(setting, row, hits, neighbours)


def found_neighbours(
    queries: Vectors, vectors: Vectors, found: NDArray[np.int64], exact: Vectors
) -> NDArray[np.float64]:
    """Return the share of the exact neighbours that each query's results have, (q,) float64.

    Results are compared by inner product in float32: equally near vectors are equally right. ``found`` are (q, k)
    rows, -1 for no result; ``exact`` has the inner products of the exact search, (q, k) float32, largest first.
    """
    shares = np.empty(len(queries))
    for row, (query, rows) in enumerate(zip(queries, found, strict=True)):
        scores = vectors[rows] @ query
        shares[row] = ((rows >= 0) & (scores >= exact[row, -1] - _TIE)).mean()
    return shares


def time_search(
    index: Any, queries: Vectors, batch: int, seconds: float | None, count: int = TOP
) -> tuple[NDArray[np.int64], list[float]]:
    """Return the rows of ``count`` results, and the milliseconds per query of each call.

    ``seconds`` end the search early.
    """
    rows, times = [], []
    index.search(queries[:batch], count)  # the first call fills the caches
    first = time.perf_counter()
    for offset in range(0, len(queries), batch):
        chunk = queries[offset : offset + batch]
        start = time.perf_counter()
        rows.append(index.search(chunk, count)[1])
        end = time.perf_counter()
        times.append(1000 * (end - start) / len(chunk))
        if seconds is not None and end - first > seconds:
            break
    return np.concatenate(rows), times
