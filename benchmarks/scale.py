"""``vpr bench scale``: cost and recall of exact and approximate search in galleries of up to a million vectors."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.config import Kind, ScaleConfig
from benchmarks.recall.seen_marks import log_seen
from benchmarks.synthetic_gallery import Gallery, build_real_gallery, grow_gallery
from export.backends.registry import default_threads
from vpr.artifacts.writer import check_output, config_to_json, write_artifact
from vpr.common.log import get_logger
from vpr.data.seen import count_seen, hash_products, read_seen
from vpr.retrieval.embeddings import load_embeddings
from vpr.retrieval.search import search

log = get_logger(__name__)

# Strings of faiss.index_factory. IVF has about sqrt(n) lists; PQ has one byte for 4 dimensions.
_FACTORY = {
    "flat": "Flat",
    "flat-fp16": "SQfp16",
    "flat-int8": "SQ8",
    "ivf-flat": "IVF{lists},Flat",
    "ivf-int8": "IVF{lists},SQ8",
    "ivf-pq": "IVF{lists},PQ{bytes}",
    "hnsw": "HNSW32,Flat",
}
_NEEDED: dict[Kind, int] = {"ivf-pq": 256}  # vectors to train on: one for each of the 256 codes
_TOP = 10
_TIE = 1e-5  # float32 sums in a different order differ by less than this


@dataclass(frozen=True)
class ScaleRow:
    """One index of one gallery. Unmeasured values are None, with the reason in ``notes``."""

    size: int  # number of vectors in the gallery
    kind: Kind  # kind of the index
    train_seconds: float | None = None  # seconds to train the index, with all threads
    fill_seconds: float | None = None  # seconds to fill the index, with all threads
    index_bytes: int | None = None  # bytes of the written index; its memory apart from bookkeeping
    single_ms: float | None = None  # median milliseconds of a single query, with one thread
    batch_ms: dict[int, float] | None = None  # median milliseconds of a query in a batch, by number of threads
    recall_at_1: float | None = None  # share of queries whose first result is as near as the exact one
    recall_at_10: float | None = None  # share of the exact ten nearest that the index finds
    product_recall_at_1: float | None = None  # share of queries whose first result is of their product
    notes: str = ""  # reasons for missing values


def measure_scale_table(config: ScaleConfig) -> Path:
    """Measure every index at every size and write an artifact of kind ``report`` with ``scale.json``."""
    check_output(config.output, "report", "scale.json")
    embeddings = load_embeddings(config.embeddings)
    real = build_real_gallery(embeddings, config.queries, config.seed)
    seen = count_seen(read_seen(embeddings.artifact), hash_products(embeddings.products.tolist()))
    log_seen(embeddings.model.name, seen)
    rows = list(measure_scale(config, real))
    parents = [embeddings.artifact.as_parent("embeddings")]
    with write_artifact(config.output, "report", config_to_json(config), parents) as draft:
        draft.metrics = {"seen": asdict(seen)}
        (draft.path / "scale.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    log.info(f"{config.output}: {len(rows)} indexes")
    return Path(config.output)


def measure_scale(config: ScaleConfig, real: Gallery) -> Iterator[ScaleRow]:
    """Yield a row for each size and kind as soon as it is measured."""
    measured: dict[Kind, ScaleRow] = {}
    for size in config.sizes:
        gallery = grow_gallery(real, size, config.seed)
        exact = search(gallery.queries, gallery.vectors, _TOP)[0]
        for kind in config.kinds:
            expected = _expected_seconds(measured.get(kind), size)
            if size < (needed := _NEEDED.get(kind, 1)):
                row = ScaleRow(size, kind, notes=f"not built: its training needs {needed} vectors")
            elif expected > config.build_seconds:
                row = ScaleRow(size, kind, notes=f"not built: expected {expected:.0f} s, above --build-seconds")
            else:
                row = measured[kind] = measure_index(kind, gallery, exact, config)
            _log_row(row)
            yield row


def measure_index(kind: Kind, gallery: Gallery, exact: NDArray[np.float32], config: ScaleConfig) -> ScaleRow:
    """Build an index, time it and compare it with ``exact``, the (queries, 10) descending products of exact search."""
    import faiss

    threads = default_threads()
    faiss.omp_set_num_threads(threads)
    index, train_seconds, fill_seconds = _build(kind, gallery.vectors, config)
    rows, batch_times = _search(index, gallery.queries, config.batch, None)
    recall_at_1, recall_at_10 = neighbour_recall(gallery, rows, exact)
    faiss.omp_set_num_threads(1)
    single_times = _search(index, gallery.queries, 1, config.seconds)[1]
    one_thread_times = _search(index, gallery.queries, config.batch, config.seconds)[1]
    faiss.omp_set_num_threads(threads)
    right = (gallery.products[rows[:, 0]] == gallery.query_products) & (rows[:, 0] >= 0)
    batch_ms = {1: float(np.median(one_thread_times)), threads: float(np.median(batch_times))}
    costs = (train_seconds, fill_seconds, _index_bytes(index), float(np.median(single_times)), batch_ms)
    return ScaleRow(len(gallery.vectors), kind, *costs, recall_at_1, recall_at_10, float(right.mean()))


def neighbour_recall(gallery: Gallery, rows: NDArray[np.int64], exact: NDArray[np.float32]) -> tuple[float, float]:
    """Return recall@1 and recall@10 of the exact neighbours.

    Neighbours are compared by inner product: equally near vectors are equally right. ``rows`` are the (queries, 10)
    rows that the index found, -1 for no result. ``exact`` has the inner products of the exact search, (queries, 10)
    float32, largest first.
    """
    scores = np.einsum("qd,qkd->qk", gallery.queries, gallery.vectors[rows])
    scores[rows < 0] = -np.inf
    recall_at_10 = (scores >= exact[:, -1:] - _TIE).mean()
    return float((scores[:, 0] >= exact[:, 0] - _TIE).mean()), float(recall_at_10)


def _expected_seconds(previous: ScaleRow | None, size: int) -> float:
    if previous is None or previous.train_seconds is None or previous.fill_seconds is None:
        return 0.0
    return previous.train_seconds + previous.fill_seconds * size / previous.size


def _build(kind: Kind, vectors: NDArray[np.float32], config: ScaleConfig) -> tuple[Any, float, float]:
    """Return an index, the seconds of its training and the seconds of its filling."""
    import faiss

    count, dim = vectors.shape
    # Product quantisation splits the vector into equal parts.
    parts = max(number for number in range(1, max(1, dim // 4) + 1) if dim % number == 0)
    factory = _FACTORY[kind].format(lists=max(1, round(count**0.5)), bytes=parts)
    index: Any = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    start = time.perf_counter()
    index.train(vectors)
    trained = time.perf_counter()
    index.add(vectors)
    filled = time.perf_counter()
    if kind.startswith("ivf"):
        index.nprobe = config.nprobe
    if kind == "hnsw":
        index.hnsw.efSearch = max(config.ef_search, _TOP)
    return index, trained - start, filled - trained


def _search(
    index: Any, queries: NDArray[np.float32], batch: int, seconds: float | None
) -> tuple[NDArray[np.int64], list[float]]:
    """Return the rows of the results, and the milliseconds per query of each call; ``seconds`` end the search early."""
    rows, times = [], []
    index.search(queries[:batch], _TOP)  # the first call fills the caches
    first = time.perf_counter()
    for offset in range(0, len(queries), batch):
        chunk = queries[offset : offset + batch]
        start = time.perf_counter()
        rows.append(index.search(chunk, _TOP)[1])
        end = time.perf_counter()
        times.append(1000 * (end - start) / len(chunk))
        if seconds is not None and end - first > seconds:
            break
    return np.concatenate(rows), times


def _index_bytes(index: Any) -> int:
    import faiss

    total = 0

    def count(data: bytes) -> None:
        nonlocal total
        total += len(data)

    writer = faiss.PyCallbackIOWriter(count)  # type: ignore[attr-defined]
    faiss.write_index(index, writer)
    del writer  # flushes its buffer
    return total


def _log_row(row: ScaleRow) -> None:
    name = f"{row.size:>9,} {row.kind:<9}"
    if row.single_ms is None or row.index_bytes is None:
        log.info(f"  {name} {row.notes}")
        return
    recalls = f"recall@10 of exact search {row.recall_at_10:.3f}  product recall@1 {row.product_recall_at_1:.3f}"
    log.info(f"  {name} p50 {row.single_ms:.3f} ms  {row.index_bytes / 1e6:.0f} MB  {recalls}")
