"""Trial of embedded vector databases: this file imports nothing of the project.

``python experiments/external/vector_stores.py measure STORE FOLDER COUNT`` measures a database in its own environment.
``kill STORE FOLDER TRIALS`` kills writers, and ``write STORE FOLDER`` is such a writer. ``make other-databases``
installs the environments.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil

DIM, LATENT, VIEWS, K, SEED = 256, 48, 4, 10, 0
KILL_BATCH = 50
CHANGED = 1000
QUERIES = 100
MAX_SECONDS = 20  # of all queries
PARTITIONS, PROBES = 512, 64  # of IVF_FLAT
PRICES = 100
FILTERED_PRICE = 10  # a tenth of the images is cheaper


def draw(count: int) -> np.ndarray:
    """Return (count, 256) float32 unit vectors: four images of each product, around 48 latent directions."""
    rng = np.random.default_rng(SEED)
    basis = rng.standard_normal((LATENT, DIM), dtype=np.float32)
    latent = np.repeat(rng.standard_normal((-(-count // VIEWS), LATENT), dtype=np.float32), VIEWS, axis=0)[:count]
    latent += 0.35 * rng.standard_normal(latent.shape, dtype=np.float32)
    vectors = latent @ basis
    vectors += rng.standard_normal(vectors.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


class Lance:
    """LanceDB: a folder of columnar files, each change is a new version; IVF_FLAT index."""

    batch = 50_000  # rows per call

    def __init__(self, folder: str) -> None:
        import lancedb

        self.database = lancedb.connect(folder)
        names = self.database.list_tables().tables
        self.table: Any = self.database.open_table("images") if "images" in names else None

    @staticmethod
    def _rows(numbers: np.ndarray, vectors: np.ndarray) -> Any:
        import pyarrow as pa

        flat = pa.array(np.ascontiguousarray(vectors).ravel())
        return pa.table(
            {
                "id": pa.array(numbers),
                "price": pa.array(numbers % PRICES),
                "vector": pa.FixedSizeListArray.from_arrays(flat, DIM),
            }
        )

    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Add vectors with these numbers."""
        rows = self._rows(numbers, vectors)
        if self.table is None:
            self.table = self.database.create_table("images", rows)
        else:
            self.table.add(rows)

    def index(self) -> None:
        """Build the index."""
        from lancedb.index import IvfFlat

        self.table.create_index("vector", config=IvfFlat(distance_type="dot", num_partitions=PARTITIONS))

    def upsert(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Replace vectors with these numbers."""
        merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(self._rows(numbers, vectors))

    def remove(self, numbers: np.ndarray) -> None:
        """Remove vectors."""
        self.table.delete(f"id in ({', '.join(map(str, numbers.tolist()))})")

    def search(self, query: np.ndarray, cheap: bool = False) -> list[int]:
        """Return the numbers of the ten nearest vectors, of cheap ones on request."""
        builder = self.table.search(query).distance_type("dot").nprobes(PROBES).select(["id", "_distance"]).limit(K)
        if cheap:
            builder = builder.where(f"price < {FILTERED_PRICE}", prefilter=True)
        return builder.to_arrow()["id"].to_pylist()

    def ids(self) -> list[int]:
        """Return the numbers of all vectors."""
        return [] if self.table is None else self.table.search().select(["id"]).limit(None).to_arrow()["id"].to_pylist()

    def close(self) -> None:
        """Close the database."""


class Milvus:
    """Milvus Lite: a folder that one process opens; IVF_FLAT index of faiss."""

    batch = 5_000  # a request is limited to 64 MB

    def __init__(self, folder: str) -> None:
        from pymilvus import DataType, MilvusClient

        Path(folder).mkdir(parents=True, exist_ok=True)
        self.client = MilvusClient(f"{folder}/gallery.db")
        if not self.client.has_collection("images"):
            schema = MilvusClient.create_schema(auto_id=False)
            schema.add_field("id", DataType.INT64, is_primary=True)
            schema.add_field("price", DataType.INT64)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIM)
            self.client.create_collection("images", schema=schema)
        elif self.client.list_indexes("images"):
            self.client.load_collection("images")

    def _rows(self, numbers: np.ndarray, vectors: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"id": number, "price": number % PRICES, "vector": vector}
            for number, vector in zip(numbers.tolist(), vectors, strict=True)
        ]

    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Add vectors with these numbers."""
        self.client.insert("images", self._rows(numbers, vectors))

    def index(self) -> None:
        """Build the index."""
        self.client.flush("images")
        parameters = self.client.prepare_index_params()
        parameters.add_index("vector", index_type="IVF_FLAT", metric_type="IP", params={"nlist": PARTITIONS})
        self.client.create_index("images", parameters)
        self.client.load_collection("images")

    def upsert(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Replace vectors with these numbers."""
        self.client.upsert("images", self._rows(numbers, vectors))

    def remove(self, numbers: np.ndarray) -> None:
        """Remove vectors."""
        self.client.delete("images", ids=numbers.tolist())

    def search(self, query: np.ndarray, cheap: bool = False) -> list[int]:
        """Return the numbers of the ten nearest vectors, of cheap ones on request."""
        condition = f"price < {FILTERED_PRICE}" if cheap else ""
        found = self.client.search(
            "images", [query.tolist()], filter=condition, limit=K, search_params={"params": {"nprobe": PROBES}}
        )
        return [hit["id"] for hit in found[0]]

    def ids(self) -> list[int]:
        """Return the numbers of all vectors."""
        if not self.client.list_indexes("images"):
            self.index()
        iterator = self.client.query_iterator("images", batch_size=1000, filter="id >= 0", output_fields=["id"])
        found: list[int] = []
        while rows := iterator.next():
            found += [row["id"] for row in rows]
        return found

    def close(self) -> None:
        """Close the database."""
        self.client.close()


class Qdrant:
    """Local mode of the Qdrant client: SQLite, and all vectors in memory; it has no index."""

    batch = 5_000

    def __init__(self, folder: str) -> None:
        from qdrant_client import QdrantClient, models

        self.models, self.client = models, QdrantClient(path=folder)
        if not self.client.collection_exists("images"):
            vectors = models.VectorParams(size=DIM, distance=models.Distance.DOT)
            self.client.create_collection("images", vectors_config=vectors)

    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Add vectors with these numbers."""
        self.client.upsert(
            "images",
            self.models.Batch(
                ids=numbers.tolist(),
                vectors=vectors.tolist(),
                payloads=[{"price": number % PRICES} for number in numbers.tolist()],
            ),
        )

    upsert = add

    def index(self) -> None:
        """Build the index."""

    def remove(self, numbers: np.ndarray) -> None:
        """Remove vectors."""
        self.client.delete("images", self.models.PointIdsList(points=numbers.tolist()))

    def search(self, query: np.ndarray, cheap: bool = False) -> list[int]:
        """Return the numbers of the ten nearest vectors, of cheap ones on request."""
        models = self.models
        condition = models.FieldCondition(key="price", range=models.Range(lt=FILTERED_PRICE))
        chosen = models.Filter(must=[condition]) if cheap else None
        found = self.client.query_points("images", query=query, limit=K, query_filter=chosen)
        return [point.id for point in found.points]

    def ids(self) -> list[int]:
        """Return the numbers of all vectors."""
        found, offset = [], None
        while True:
            points, offset = self.client.scroll("images", limit=10_000, offset=offset, with_payload=False)
            found += [point.id for point in points]
            if offset is None:
                return found

    def close(self) -> None:
        """Close the database."""
        self.client.close()


class Faiss:
    """Reference: HNSW of faiss in memory. It has no metadata, no removal and no crash safety."""

    batch = 100_000

    def __init__(self, folder: str) -> None:
        self.hnsw = faiss.IndexHNSWFlat(DIM, 32, faiss.METRIC_INNER_PRODUCT)
        self.hnsw.hnsw.efConstruction, self.hnsw.hnsw.efSearch = 80, 128

    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Add vectors with these numbers."""
        self.hnsw.add(vectors)

    def index(self) -> None:
        """Build the index."""

    def search(self, query: np.ndarray, cheap: bool = False) -> list[int]:
        """Return the numbers of the ten nearest vectors, of cheap ones on request."""
        return self.hnsw.search(query[None], K)[1][0].tolist()

    def close(self) -> None:
        """Close the database."""


STORES: dict[str, Callable[[str], Any]] = {"lancedb": Lance, "milvus-lite": Milvus, "qdrant": Qdrant, "faiss": Faiss}


class _Memory(threading.Thread):
    """Largest resident memory of this process and its children, above that at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.stopped = psutil.Process(), threading.Event()
        self.first = self.peak = self.read()

    def read(self) -> int:
        """Return the resident bytes."""
        total = 0
        for process in (self.process, *self.process.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def run(self) -> None:
        """Read the memory until stopped."""
        while not self.stopped.wait(0.1):
            self.peak = max(self.peak, self.read())

    def used(self) -> int:
        """Return the largest growth in bytes."""
        self.peak = max(self.peak, self.read())
        return self.peak - self.first


def _parts(count: int, size: int) -> Iterator[slice]:
    yield from (slice(start, min(start + size, count)) for start in range(0, count, size))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(store: str, folder: str, count: int) -> dict[str, Any]:
    """Fill a database, change and search it; return times in seconds and milliseconds, bytes, and recall@10."""
    shutil.rmtree(folder, ignore_errors=True)
    vectors = draw(count + CHANGED)
    numbers = np.arange(len(vectors))
    rng = np.random.default_rng(SEED + 1)
    queries = vectors[rng.choice(count, QUERIES, replace=False)] + 0.02 * rng.standard_normal((QUERIES, DIM))
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    memory = _Memory()
    memory.start()
    database = STORES[store](folder)

    def fill() -> None:
        for part in _parts(count, database.batch):
            database.add(numbers[part], vectors[part])

    result: dict[str, Any] = {"store": store, "vectors": count, "fill_seconds": _seconds(fill)}
    result["index_seconds"] = _seconds(database.index)
    new = slice(count, count + CHANGED)
    result["add_seconds"] = _seconds(lambda: database.add(numbers[new], vectors[new]))
    present = np.ones(len(vectors), dtype=bool)
    if store != "faiss":
        replaced = numbers[:CHANGED]
        vectors[:CHANGED] = vectors[:CHANGED][::-1]
        result["upsert_seconds"] = _seconds(lambda: database.upsert(replaced, vectors[:CHANGED]))
        removed = numbers[2 * CHANGED : 3 * CHANGED]
        result["remove_seconds"] = _seconds(lambda: database.remove(removed))
        present[removed] = False
        stored = database.ids()
        result["counts_right"] = len(stored) == present.sum() and set(stored) == set(numbers[present].tolist())
    result |= _search(database, queries, vectors, present, with_filter=store != "faiss")
    result["memory_bytes"] = memory.used()
    memory.stopped.set()
    result["disk_bytes"] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    database.close()
    return result


def _search(
    database: Any, queries: np.ndarray, vectors: np.ndarray, present: np.ndarray, with_filter: bool
) -> dict[str, Any]:
    """Return latencies of single queries and recall@10 against flat faiss, without and with a filter."""
    result: dict[str, Any] = {}
    for name, cheap in (("", False), ("filtered_", True)):
        if cheap and not with_filter:
            continue
        allowed = present & (np.arange(len(vectors)) % PRICES < FILTERED_PRICE) if cheap else present
        rows = np.flatnonzero(allowed)
        exact = rows[faiss.knn(queries, vectors[rows], K, metric=faiss.METRIC_INNER_PRODUCT)[1]]
        for query in queries[:3]:
            database.search(query, cheap)
        milliseconds, hits = [], 0
        deadline = time.perf_counter() + MAX_SECONDS
        for query, neighbours in zip(queries, exact, strict=True):
            started = time.perf_counter()
            found = database.search(query, cheap)
            milliseconds.append(1e3 * (time.perf_counter() - started))
            hits += len(set(found) & set(neighbours.tolist()))
            if time.perf_counter() > deadline:
                break
        result[f"{name}queries"] = len(milliseconds)
        result[f"{name}p50_ms"], result[f"{name}p99_ms"] = np.percentile(milliseconds, [50, 99]).tolist()
        result[f"{name}recall_at_10"] = hits / (K * len(milliseconds))
    return result


def write(store: str, folder: str) -> None:
    """Add batches until killed; print the number of each batch once the database has accepted it."""
    vectors = draw(KILL_BATCH)
    database = STORES[store](folder)
    batches = max(database.ids(), default=-1) // KILL_BATCH + 1
    while True:
        database.add(np.arange(KILL_BATCH) + batches * KILL_BATCH, vectors)
        print(batches, flush=True)
        batches += 1


def kill(store: str, folder: str, trials: int) -> dict[str, Any]:
    """Kill a writer ``trials`` times; return the batches that were lost or torn, and databases that do not open."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = random.Random(SEED)
    result: dict[str, Any] = {
        "store": store,
        "kills": 0,
        "accepted_batches": 0,
        "lost_batches": 0,
        "torn_batches": 0,
        "not_opened": 0,
    }
    accepted: set[int] = set()
    torn: set[int] = set()
    for _ in range(trials):
        command = [sys.executable, __file__, "write", store, folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(rng.uniform(0, 0.5))
            servers = psutil.Process(process.pid).children(recursive=True)  # of a database that starts its own
            process.send_signal(signal.SIGKILL)
            accepted |= {int(line) for line in (first, *process.stdout) if line.endswith("\n")}
        result["kills"] += process.returncode == -signal.SIGKILL
        for server in servers:
            server.kill()
        check = [sys.executable, __file__, "read", store, folder]
        read = subprocess.run(check, capture_output=True, text=True, check=False)
        if read.returncode:
            result["not_opened"] += 1
            result["error"] = read.stderr.strip().splitlines()[-1][:200]
            break
        sizes = {int(key): size for key, size in json.loads(read.stdout.splitlines()[-1]).items()}
        result["lost_batches"] += len(accepted - set(sizes))
        torn |= {batch for batch, size in sizes.items() if size != KILL_BATCH}
        accepted &= set(sizes)
    result |= {"accepted_batches": len(accepted), "torn_batches": len(torn)}
    return result


def read(store: str, folder: str) -> dict[int, int]:
    """Return the number of stored vectors of each batch."""
    database = STORES[store](folder)
    stored = np.array(database.ids(), dtype=np.int64)
    database.close()
    batches, sizes = np.unique(stored // KILL_BATCH, return_counts=True)
    return dict(zip(batches.tolist(), sizes.tolist(), strict=True))


def main(words: list[str]) -> None:
    """Run one part and print its result as JSON."""
    part, store, folder, *count = words
    if part == "write":
        write(store, folder)
    elif part == "read":
        print(json.dumps(read(store, folder)))
    else:
        function = measure if part == "measure" else kill
        print(json.dumps(function(store, folder, int(count[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
