"""``vpr bench scale``: what exact and approximate search cost, and lose, as the gallery grows to a million vectors."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.config import Kind, ScaleConfig
from benchmarks.synthetic_gallery import Gallery, grow, real_gallery
from export.backends.registry import default_threads
from vpr.artifacts.store import check_output, config_to_json, write_artifact
from vpr.common.log import get_logger
from vpr.retrieval.embeddings import load_embeddings
from vpr.retrieval.search import search

log = get_logger(__name__)

# Of faiss's index factory; an IVF index has about the root of the gallery's size of lists, PQ a byte for 4 dimensions.
_FACTORY = {
    "flat": "Flat",
    "flat-fp16": "SQfp16",
    "flat-int8": "SQ8",
    "ivf-flat": "IVF{lists},Flat",
    "ivf-int8": "IVF{lists},SQ8",
    "ivf-pq": "IVF{lists},PQ{bytes}",
    "hnsw": "HNSW32,Flat",
}
_TOP = 10
_TIE = 1e-5  # inner products nearer than this are the same to float32 sums of another order


@dataclass(frozen=True)
class ScaleRow:
    """One index of one gallery. What was not measured is None, and ``notes`` say why.

    Attributes:
        size: vectors in the gallery.
        kind: of index.
        train_seconds: training it, by all threads.
        fill_seconds: filling it, by all threads.
        index_bytes: of the index when it is written, which is what it holds in memory but for its bookkeeping.
        single_ms: median time of a query on its own, one thread.
        batch_ms: median time of a query in a batch, by number of threads.
        recall_at_1: share of queries whose first result is as near as the exact one.
        recall_at_10: share of the exact ten that are found.
        product_recall_at_1: share of queries whose first result is of their product.
        notes: what is missing, and why.
    """

    size: int
    kind: Kind
    train_seconds: float | None = None
    fill_seconds: float | None = None
    index_bytes: int | None = None
    single_ms: float | None = None
    batch_ms: dict[int, float] | None = None
    recall_at_1: float | None = None
    recall_at_10: float | None = None
    product_recall_at_1: float | None = None
    notes: str = ""


def measure_scale_table(config: ScaleConfig) -> Path:
    """Measure every index of every size and write an artifact of kind ``report`` with ``scale.json``."""
    check_output(config.output, "report", "scale.json")
    embeddings = load_embeddings(config.embeddings)
    real = real_gallery(embeddings, config.queries, config.seed)
    rows = list(measure_scale(config, real))
    with write_artifact(
        config.output, "report", config_to_json(config), [embeddings.artifact.as_parent("embeddings")]
    ) as draft:
        (draft.path / "scale.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    log.info(f"{config.output}: {len(rows)} indexes")
    return Path(config.output)


def measure_scale(config: ScaleConfig, real: Gallery) -> Iterator[ScaleRow]:
    """A row for each size and kind, as they are measured."""
    built: dict[Kind, ScaleRow] = {}
    for size in config.sizes:
        gallery = grow(real, size, config.seed)
        exact = search(gallery.queries, gallery.vectors, _TOP)[0]
        for kind in config.kinds:
            expected = _expected_seconds(built.get(kind), size)
            if expected > config.build_seconds:
                row = ScaleRow(size, kind, notes=f"not built: it would take about {expected:.0f} s")
            else:
                row = built[kind] = measure_index(kind, gallery, exact, config)
            _say_row(row)
            yield row


def measure_index(kind: Kind, gallery: Gallery, exact: NDArray[np.float32], config: ScaleConfig) -> ScaleRow:
    """Build an index, time it and compare what it finds.

    Args:
        kind: of index.
        gallery: what is searched.
        exact: (queries, 10) float32, inner products of the exact search, largest first.
        config: how.
    """
    import faiss

    threads = default_threads()
    faiss.omp_set_num_threads(threads)
    index, trained, filled = _build(kind, gallery.vectors, config)
    found, per_batch = _search(index, gallery.queries, config.batch, None)
    first, ten = found_share(gallery, found, exact)
    faiss.omp_set_num_threads(1)
    single = _search(index, gallery.queries, 1, config.seconds)[1]
    alone = _search(index, gallery.queries, config.batch, config.seconds)[1]
    faiss.omp_set_num_threads(threads)
    right = (gallery.products[found[:, 0]] == gallery.asked) & (found[:, 0] >= 0)
    by_threads = {1: float(np.median(alone)), threads: float(np.median(per_batch))}
    return ScaleRow(
        len(gallery.vectors),
        kind,
        trained,
        filled,
        _index_bytes(index),
        float(np.median(single)),
        by_threads,
        first,
        ten,
        float(right.mean()),
    )


def found_share(gallery: Gallery, found: NDArray[np.int64], exact: NDArray[np.float32]) -> tuple[float, float]:
    """Shares of the exact first result, and of the exact ten, that were found; -1 in ``found`` is nothing.

    By inner product: of vectors equally near either is right.
    """
    scores = np.einsum("qd,qkd->qk", gallery.queries, gallery.vectors[found])
    scores[found < 0] = -np.inf
    ten = (scores >= exact[:, -1:] - _TIE).mean()
    return float((scores[:, 0] >= exact[:, 0] - _TIE).mean()), float(ten)


def _expected_seconds(before: ScaleRow | None, size: int) -> float:
    if before is None or before.train_seconds is None or before.fill_seconds is None:
        return 0.0
    return before.train_seconds + before.fill_seconds * size / before.size


def _build(kind: Kind, vectors: NDArray[np.float32], config: ScaleConfig) -> tuple[Any, float, float]:
    """An index, the seconds that training took, and those that filling took."""
    import faiss

    count, dim = vectors.shape
    text = _FACTORY[kind].format(lists=max(1, round(count**0.5)), bytes=max(1, dim // 4))
    index: Any = faiss.index_factory(dim, text, faiss.METRIC_INNER_PRODUCT)
    begun = time.perf_counter()
    index.train(vectors)
    trained = time.perf_counter()
    index.add(vectors)
    filled = time.perf_counter()
    if kind.startswith("ivf"):
        index.nprobe = config.probes
    if kind == "hnsw":
        index.hnsw.efSearch = max(config.ef, _TOP)
    return index, trained - begun, filled - trained


def _search(
    index: Any, queries: NDArray[np.float32], batch: int, seconds: float | None
) -> tuple[NDArray[np.int64], list[float]]:
    """Rows found, and milliseconds per query of each call; of all queries, or of those that ``seconds`` suffice for."""
    found, times = [], []
    index.search(queries[:batch], _TOP)  # the first call finds cold caches
    begun = time.perf_counter()
    for start in range(0, len(queries), batch):
        asked = queries[start : start + batch]
        before = time.perf_counter()
        found.append(index.search(asked, _TOP)[1])
        after = time.perf_counter()
        times.append(1000 * (after - before) / len(asked))
        if seconds is not None and after - begun > seconds:
            break
    return np.concatenate(found), times


def _index_bytes(index: Any) -> int:
    import faiss

    total = 0

    def count(data: bytes) -> None:
        nonlocal total
        total += len(data)

    writer = faiss.PyCallbackIOWriter(count)  # type: ignore[attr-defined]
    faiss.write_index(index, writer)
    del writer  # writes what it has buffered
    return total


def _say_row(row: ScaleRow) -> None:
    if row.single_ms is None or row.index_bytes is None:
        log.info(f"  {row.size} {row.kind}: {row.notes}")
        return
    log.info(
        f"  {row.size} {row.kind}: {row.single_ms:.3f} ms, {row.index_bytes / 1e6:.0f} MB, recall@10 of the exact "
        f"{row.recall_at_10:.3f}, product recall@1 {row.product_recall_at_1:.3f}"
    )
