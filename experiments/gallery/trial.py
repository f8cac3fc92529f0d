"""Trial of embedded vector databases in their own environments: installation, kills, times and recall."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.figures import ROOT, Figure, Row
from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

_PROGRAM = ROOT / "experiments" / "external" / "vector_stores.py"
_MAX_SECONDS = 240  # of one measurement
_KILLS = 10


@dataclass(frozen=True)
class Store:
    """A database of the trial.

    Attributes:
        name: Name in ``experiments/external/vector_stores.py``.
        environment: Folder of its environment.
        packages: Packages with the versions to state.
        licence: Licence of the packages.
        readers: Other processes during a write, as its documentation says.
        server: Server that the same client speaks to.
        counts: Numbers of vectors to measure.
        has_kills: Whether writers are killed.
    """

    name: str
    environment: str
    packages: tuple[str, ...]
    licence: str
    readers: str
    server: str
    counts: tuple[int, ...]
    has_kills: bool = True


# Milvus Lite and Qdrant's local mode are measured with fewer vectors: they take more than minutes to fill.
STORES = (
    Store(
        "lancedb",
        ".venv-lancedb",
        ("lancedb",),
        "Apache-2.0",
        "read a version",
        "object storage (S3, GCS, Azure), LanceDB Cloud or Enterprise (proprietary)",
        (100_000, 1_000_000),
    ),
    Store(
        "milvus-lite",
        ".venv-pymilvus",
        ("pymilvus", "milvus-lite"),
        "Apache-2.0",
        "locked out",
        "Milvus (Apache-2.0)",
        (100_000,),
    ),
    Store(
        "qdrant",
        ".venv-qdrant-client",
        ("qdrant-client",),
        "Apache-2.0",
        "locked out",
        "Qdrant (Apache-2.0)",
        (5_000,),
    ),
    Store("faiss", ".venv-lancedb", ("faiss-cpu",), "MIT", "–", "none", (100_000,), has_kills=False),
)


def run_store(store: Store, part: str, count: int, max_seconds: float = _MAX_SECONDS) -> dict[str, Any] | None:
    """Run a part of the program in the store's environment; return its result, None if it took too long.

    Raises:
        UserError: The environment does not exist, or the program failed.
    """
    python = ROOT / store.environment / "bin" / "python"
    if not python.is_file():
        raise UserError(f"{store.environment}: the environment does not exist. Run `make other-databases`.")
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), str(_PROGRAM), part, store.name, f"{folder}/{store.name}", str(count)]
        try:
            process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max_seconds)
        except subprocess.TimeoutExpired:
            return None
    if process.returncode:
        raise UserError(
            f"{store.name} {part}: it failed ({process.stderr.strip()[-300:]}). Run `make other-databases`."
        )
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def version_of(store: Store) -> str:
    """Return the names and versions of the store's packages."""
    python = ROOT / store.environment / "bin" / "python"
    code = "import importlib.metadata as m, sys; print(' '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    return subprocess.run(
        [str(python), "-c", code, *store.packages], capture_output=True, text=True, check=True
    ).stdout.strip()


def time_stores(stores: Sequence[Store], command: str) -> tuple[list[Figure], list[Row]]:
    """Measure times, memory and recall of each database at each of its numbers of vectors."""
    figures: list[Figure] = []
    rows: list[Row] = []
    for store in stores:
        for count in store.counts:
            result = run_store(store, "measure", count)
            rows.append(_time_row(store, count, result))
            log.info(f"  {store.name}, {count:,} vectors: {result}")
            if result and count == 1_000_000:
                figures += _figures(store, result, command)
    return figures, rows


def kill_stores(stores: Sequence[Store], command: str, kills: int = _KILLS) -> tuple[list[Figure], list[Row]]:
    """Kill writers of each database, and state what is lost."""
    figures: list[Figure] = []
    rows: list[Row] = []
    for store in (store for store in stores if store.has_kills):
        result = run_store(store, "kill", kills)
        log.info(f"  {store.name}: {result}")
        if result is None:
            raise UserError(f"{store.name}: killing its writers took more than {_MAX_SECONDS} s. Run it alone.")
        rows.append(
            {
                "database": store.name,
                "versions": version_of(store),
                "licence": store.licence,
                "kills": result["kills"],
                "accepted batches": result["accepted_batches"],
                "lost": result["lost_batches"],
                "partly written": result["torn_batches"],
                "does not open": result["not_opened"],
                "other processes during a write": store.readers,
                "server": store.server,
            }
        )
        for key, title in (("lost_batches", "lost"), ("torn_batches", "partly written")):
            name = f"{store.name}, {kills} kills of a writer: batches {title}"
            figures.append(Figure(name, result[key], "", None, "<=", command))
    return figures, rows


def _time_row(store: Store, count: int, result: dict[str, Any] | None) -> Row:
    values: Row = dict.fromkeys(_COLUMNS, "–")
    if result is None:
        values["fill s"] = f"> {_MAX_SECONDS}"
        return {"database": store.name, "vectors": f"{count:,}", **values}

    def search(prefix: str) -> tuple[str, str]:
        if f"{prefix}p50_ms" not in result:
            return "–", "–"
        p50, p99 = (f"{result[f'{prefix}{name}_ms']:.1f}" for name in ("p50", "p99"))
        return f"{p50} / {p99}", f"{result[f'{prefix}recall_at_10']:.3f}"

    values["fill s"] = f"{result['fill_seconds']:.1f}"
    values["index s"] = f"{result['index_seconds']:.1f}"
    for name in ("add", "remove", "upsert"):
        if f"{name}_seconds" in result:
            values[f"{name} 1,000, s"] = f"{result[f'{name}_seconds']:.2f}"
    values["search ms, p50 / p99"], values["recall@10"] = search("")
    values["filtered ms, p50 / p99"], values["filtered recall@10"] = search("filtered_")
    values["memory MB"] = f"{result['memory_bytes'] / 1e6:.0f}"
    values["disk MB"] = f"{result['disk_bytes'] / 1e6:.0f}" if result["disk_bytes"] else "–"
    values["ids right"] = {True: "yes", False: "**no**", None: "–"}[result.get("counts_right")]
    return {"database": store.name, "vectors": f"{count:,}", **values}


_COLUMNS = (
    *("fill s", "index s", "add 1,000, s", "upsert 1,000, s", "remove 1,000, s", "search ms, p50 / p99", "recall@10"),
    *("filtered ms, p50 / p99", "filtered recall@10", "memory MB", "disk MB", "ids right"),
)


def _figures(store: Store, result: dict[str, Any], command: str) -> list[Figure]:
    title = f"{store.name}, {result['vectors']:,} vectors of 256 dimensions"
    values = (
        ("fill", result["fill_seconds"], "s"),
        ("index", result["index_seconds"], "s"),
        ("add 1,000", result["add_seconds"], "s"),
        ("remove 1,000", result["remove_seconds"], "s"),
        ("search p50", result["p50_ms"], "ms"),
        ("search p99", result["p99_ms"], "ms"),
        ("recall@10 against flat faiss", result["recall_at_10"], ""),
        ("memory", result["memory_bytes"] / 1e6, "MB"),
    )
    return [Figure(f"{title}: {name}", value, unit, None, "<=", command) for name, value, unit in values]
