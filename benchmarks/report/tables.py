"""Columns of the report's tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.report.recommendation import format_signed, timed_batches
from benchmarks.report.schema import Interval, Row, Skew, SkewRow
from benchmarks.report.storage_schema import Storage, StorageRow

SKEW_HEADINGS = ("queries by", "recall@1 [95 %]", "drop [95 %]", "cosine", "queries changed")


def skew_cells(row: SkewRow) -> list[str]:
    """Return the cells of a pipeline below :data:`SKEW_HEADINGS`; a star marks a change of recall@1 beyond noise."""
    recall, drop = f"{row.recall_at_1:.3f}", format_signed(row.drop)
    if row.ci95 is not None:
        recall += f" [{row.ci95[0]:.3f}, {row.ci95[1]:.3f}]"
    if row.drop_ci95 is not None:
        drop += f" [{', '.join(map(format_signed, row.drop_ci95))}]"
    star = " *" if row.is_significant else ""
    return [row.pipeline, recall, drop + star, f"{row.cosine_mean:.4f}", f"{row.inputs_changed:.0%}"]


def describe_skew(skew: Skew) -> str:
    """Return the title of the table of other pipelines."""
    return f"Queries of {skew.model} by other preprocessing: {skew.queries} of {skew.products} products"


STORAGE_HEADINGS = (
    *("vectors", "setting", "bytes per vector", "ms per query (p50)"),
    *("recall@1 [95 %]", "drop", "neighbours kept"),
)


def storage_cells(row: StorageRow) -> list[str]:
    """Return the cells of a setting below :data:`STORAGE_HEADINGS`."""
    if row.recall_at_1 is None or row.bytes_per_vector is None or row.single_ms is None:
        return [f"{row.size:,}", row.name, row.notes, *["–"] * 4]
    recall = f"{row.recall_at_1:.3f}"
    if row.ci95 is not None:
        recall += f" [{row.ci95[0]:.3f}, {row.ci95[1]:.3f}]"
    drop = "–" if row.drop is None else format_signed(row.drop)
    kept = "–" if row.neighbours is None else f"{row.neighbours:.3f}"
    return [f"{row.size:,}", row.name, f"{row.bytes_per_vector:.1f}", f"{row.single_ms:.3f}", recall, drop, kept]


def describe_storage(storage: Storage) -> str:
    """Return the title of the table of storage settings."""
    compared = "" if storage.reference == storage.model else f", against {storage.reference}"
    others = " (leave-one-out)" if storage.leave_one_out else ""
    return f"Storage of {storage.model}{compared}: {storage.queries} queries of {storage.products} products{others}"


@dataclass(frozen=True)
class Column:
    """One column."""

    heading: str  # title of the column
    # value of a row, which the column is sorted by; None if it was not measured
    value: Callable[[Row], float | str | None]
    to_text: Callable[[Any], str] = str  # text of a value
    interval: Callable[[Row], Interval | None] = lambda _: None  # 95 % interval that the text ends with, if any

    def text(self, row: Row) -> str:
        """Return the cell of a row."""
        value, ends = self.value(row), self.interval(row)
        if value is None:
            return "–"
        return self.to_text(value) + ("" if ends is None else f" [{self.to_text(ends[0])}, {self.to_text(ends[1])}]")


def main_columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of the decision: recall, its drop, latency and size."""
    return [
        *_names(),
        Column("recall@1 [95 %]", lambda row: row.recall_at_1, _fixed(3), lambda row: row.ci95),
        Column("drop to student [95 %]", lambda row: row.recall_drop, format_signed, lambda row: row.recall_drop_ci95),
        Column("recall@5", lambda row: row.recall_at_5, _fixed(3)),
        Column("mAP@1000", lambda row: row.map_at_1000, _fixed(3)),
        Column("retention", lambda row: row.retention, _fixed(2)),
        Column("cosine to student", lambda row: row.cosine_mean, _fixed(5)),
        *([Column("seen products", _seen)] if any(_seen(row) for row in rows) else []),
        *[_latency(f"ms, batch {batch}", batch, "p50") for batch in timed_batches(rows)],
        Column("MB", lambda row: _millions(row.size_bytes), _fixed(1)),
    ]


def detail_columns(rows: Sequence[Row]) -> list[Column]:
    """Return the other columns: more recall cuts, more ways to search, changed queries, latency tails."""
    return [
        *_names(),
        Column("recall@10", lambda row: row.recall_at_10, _fixed(3)),
        Column("mAP", lambda row: row.map, _fixed(3)),
        Column("re-ranked recall@1", lambda row: row.reranked.recall_at_1 if row.reranked else None, _fixed(3)),
        Column("re-ranked mAP", lambda row: row.reranked.map if row.reranked else None, _fixed(3)),
        Column(
            "recall@1, teacher's gallery", lambda row: row.asymmetric.recall_at_1 if row.asymmetric else None, _fixed(3)
        ),
        Column("first result changed", lambda row: row.first_changed.queries if row.first_changed else None),
        Column("corrected", lambda row: row.first_changed.right if row.first_changed else None),
        Column("broken", lambda row: row.first_changed.wrong if row.first_changed else None),
        Column("top-10 overlap", lambda row: row.top10_overlap, _fixed(3)),
        Column("min cosine", lambda row: row.cosine_min, _fixed(5)),
        *[_latency(f"p99 ms, batch {batch}", batch, "p99") for batch in timed_batches(rows)],
        Column("cold start, ms", lambda row: row.cold_start_ms, _fixed(0)),
        Column("peak memory, MB", lambda row: _millions(row.peak_memory_bytes), _fixed(0)),
        Column("licences", lambda row: None if row.licences is None else ", ".join(row.licences) or "unknown"),
    ]


def extra_columns(rows: Sequence[Row]) -> list[Column]:
    """Return columns for keys outside the schema: numbers, texts, and numbers by batch; none without such keys."""
    keys = dict.fromkeys(key for row in rows for key in row.model_extra or {})
    simple = [key for key in keys if any(_is_simple(_extra(row, key)) for row in rows)]
    columns = [Column(key.replace("_", " "), _simple_extra(key), _plain_text) for key in simple]
    for key in keys:
        batches = {batch for row in rows for batch in _by_batch(row, key) if batch.isdigit()}
        for batch in sorted(batches, key=int):
            columns.append(Column(f"{key.replace('_', ' ')}, batch {batch}", _batch_extra(key, batch), _plain_text))
    return [*_names(), *columns] if columns else []


def _names() -> list[Column]:
    return [
        Column("model", lambda row: row.name),
        Column("backend", lambda row: row.backend),
        Column("precision", lambda row: row.precision),
    ]


def _seen(row: Row) -> str | None:
    """Return what a model has seen of what is scored, in few words; None if nothing."""
    seen = row.seen
    if seen is None:
        return None
    return seen.learned.removeprefix("seen: ") or seen.selected or ("unknown" if seen.unknown else None)


def _latency(heading: str, batch: str, quantile: Literal["p50", "p99"]) -> Column:
    def interval(row: Row) -> Interval | None:
        return row.milliseconds_ci95(batch) if quantile == "p50" else None

    return Column(heading, lambda row: row.milliseconds(batch, quantile), _fixed(2), interval)


def _millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _extra(row: Row, key: str) -> Any:
    return (row.model_extra or {}).get(key)


def _by_batch(row: Row, key: str) -> dict[str, Any]:
    value = _extra(row, key)
    return value if isinstance(value, dict) else {}


def _simple_extra(key: str) -> Callable[[Row], Any]:
    return lambda row: _extra(row, key)


def _batch_extra(key: str, batch: str) -> Callable[[Row], Any]:
    def value(row: Row) -> Any:
        entry = _by_batch(row, key).get(batch)
        return entry if _is_simple(entry) else None

    return value


def _is_simple(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and value != ""


def _plain_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
