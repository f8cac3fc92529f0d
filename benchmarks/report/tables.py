"""The columns of the report's tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.report.recommendation import Row, batches, milliseconds, milliseconds_ci95, signed


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        heading: over it.
        value: of a row: what is sorted by; None where there is none.
        form: the value as text.
        interval: 95 % interval that the text ends with, if any.
    """

    heading: str
    value: Callable[[Row], float | str | None]
    form: Callable[[Any], str] = str
    interval: Callable[[Row], list[float] | None] = lambda _: None

    def text(self, row: Row) -> str:
        """The cell of a row."""
        value, ends = self.value(row), self.interval(row)
        if value is None:
            return "–"
        return self.form(value) + ("" if ends is None else f" [{self.form(ends[0])}, {self.form(ends[1])}]")


def main_columns(rows: list[Row]) -> list[Column]:
    """What is decided on: recall, what is kept of it, latency and size."""
    return [
        *_names(),
        Column("recall@1 [95 %]", _key("recall_at_1"), _fixed(3), _key("ci95")),
        Column("drop to student [95 %]", _key("recall_drop"), signed, _key("recall_drop_ci95")),
        Column("recall@5", _key("recall_at_5"), _fixed(3)),
        Column("mAP@1000", _key("map_at_1000"), _fixed(3)),
        Column("retention", _key("retention"), _fixed(2)),
        Column("cosine to student", _key("cosine_mean"), _fixed(5)),
        *[Column(f"ms, batch {batch}", _latency(batch, "p50"), _fixed(2), _spread(batch)) for batch in batches(rows)],
        Column("MB", _millions("size_bytes"), _fixed(1)),
    ]


def detail_columns(rows: list[Row]) -> list[Column]:
    """The rest of what was measured: other cuts, other ways to search, what changed, tails of the latency."""
    return [
        *_names(),
        Column("recall@10", _key("recall_at_10"), _fixed(3)),
        Column("mAP", _key("map"), _fixed(3)),
        Column("re-ranked recall@1", _nested("reranked", "recall_at_1"), _fixed(3)),
        Column("re-ranked mAP", _nested("reranked", "map"), _fixed(3)),
        Column("recall@1, teacher's gallery", _nested("asymmetric", "recall_at_1"), _fixed(3)),
        Column("first result changed", _nested("first_changed", "queries")),
        Column("put right", _nested("first_changed", "right")),
        Column("put wrong", _nested("first_changed", "wrong")),
        Column("top-10 overlap", _key("top10_overlap"), _fixed(3)),
        Column("least cosine", _key("cosine_min"), _fixed(5)),
        *[Column(f"p99 ms, batch {batch}", _latency(batch, "p99"), _fixed(2)) for batch in batches(rows)],
        Column("cold start, ms", _key("cold_start_ms"), _fixed(0)),
        Column("peak memory, MB", _millions("peak_memory_bytes"), _fixed(0)),
    ]


def extra_columns(rows: list[Row], known: set[str]) -> list[Column]:
    """Numbers and texts under keys that this version does not know, and such by batch; none without any."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if key not in known and _simple(value))
    columns = [Column(key.replace("_", " "), _key(key), _plain) for key in keys]
    for key in dict.fromkeys(key for row in rows for key in row if key not in known):
        found = {batch for row in rows if isinstance(row.get(key), dict) for batch in row[key] if batch.isdigit()}
        for batch in sorted(found, key=int):
            columns.append(Column(f"{key.replace('_', ' ')}, batch {batch}", _by_batch(key, batch), _plain))
    return [*_names(), *columns] if columns else []


def texts(columns: list[Column], rows: list[Row]) -> list[dict[str, str]]:
    """A table as texts by heading."""
    return [{column.heading: column.text(row) for column in columns} for row in rows]


def _names() -> list[Column]:
    return [Column("model", _key("name")), Column("backend", _key("backend")), Column("precision", _key("precision"))]


def _key(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get(name)


def _nested(name: str, key: str) -> Callable[[Row], Any]:
    return lambda row: None if row.get(name) is None else row[name][key]


def _latency(batch: str, quantile: str) -> Callable[[Row], float | None]:
    return lambda row: milliseconds(row, batch, quantile)


def _spread(batch: str) -> Callable[[Row], list[float] | None]:
    return lambda row: milliseconds_ci95(row, batch)


def _millions(name: str) -> Callable[[Row], float | None]:
    return lambda row: None if row[name] is None else row[name] / 1e6


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _by_batch(name: str, batch: str) -> Callable[[Row], Any]:
    def value(row: Row) -> Any:
        found = row[name].get(batch) if isinstance(row.get(name), dict) else None
        return found if _simple(found) else None

    return value


def _simple(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and value != ""


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
