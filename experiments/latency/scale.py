"""Part ``scale`` of ``make figures TOPIC=latency``: galleries of up to a million vectors."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.config import ScaleConfig
from benchmarks.scale import measure_scale_table
from experiments.figures import Figure, Row
from experiments.int8.figures import sample
from student.embed import EmbedConfig, embed_catalog

_FOLDER = Path("runs/figures-latency")


def scale_figures(command: str) -> tuple[list[Figure], list[Row]]:
    """Return figures of the largest gallery and a table of all, for the size curve's student."""
    student = sample()
    vectors = embed_catalog(EmbedConfig(str(student.artifact), str(student.catalog), str(_FOLDER / "embeddings")))
    path = measure_scale_table(ScaleConfig(str(vectors), str(_FOLDER / "scale")))
    rows = json.loads((path / "scale.json").read_text(encoding="utf-8"))
    return largest(rows, command), [table_row(row) for row in rows]


def largest(rows: list[Row], command: str) -> list[Figure]:
    """Return latency, recall@10 of exact neighbours and loss of product recall@1 of the largest gallery."""
    last = [row for row in rows if row["size"] == rows[-1]["size"]]
    exact = next(row for row in last if row["kind"] == "flat")
    figures = []
    for row in last:
        name = f"{row['size']:,} vectors, {row['kind']}"
        lost = None if row["product_recall_at_1"] is None else exact["product_recall_at_1"] - row["product_recall_at_1"]
        figures += [
            Figure(f"{name}: a single query, one thread", row["single_ms"], "ms", None, "<=", command),
            Figure(f"{name}: recall@10 of the exact neighbours", row["recall_at_10"], "", None, ">=", command),
            Figure(f"{name}: product recall@1 lost against exact", lost, "", None, "<=", command),
        ]
    return figures


def table_row(row: Row) -> Row:
    """Return a row of the table."""
    head = {"vectors": f"{row['size']:,}", "index": row["kind"]}
    names = ("build s", "MB", "ms, single query, 1 thread", "ms, in a batch, by threads", "recall@1", "recall@10")
    if row["single_ms"] is None:
        return {**head, **dict.fromkeys(names, "–"), "product recall@1": row["notes"]}
    batch = ", ".join(f"{threads}: {ms:.3f}" for threads, ms in row["batch_ms"].items())
    values = (
        f"{row['train_seconds'] + row['fill_seconds']:.1f}",
        f"{row['index_bytes'] / 1e6:.1f}",
        f"{row['single_ms']:.3f}",
        batch,
        f"{row['recall_at_1']:.3f}",
        f"{row['recall_at_10']:.3f}",
    )
    return {**head, **dict(zip(names, values, strict=True)), "product recall@1": f"{row['product_recall_at_1']:.3f}"}
