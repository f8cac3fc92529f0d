"""Views of recorded tables: the rows and columns of a ``docs/results`` table that a page shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class View:
    """Rows and columns of a recorded table.

    Attributes:
        table: Name of the recorded table.
        columns: Columns of the view, in order.
        rows: Model and backend of each row; empty keeps every row.
    """

    table: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, str], ...] = ()


_RUNS = ("model", "backend", "recall@1 [95 %]")
VIEWS = {
    "demo.printed": View("demo", (*_RUNS, "ms, batch 1", "MB")),
}


def select_view(name: str, content: Mapping[str, Any]) -> list[Row] | None:
    """Return the rows of a view such as ``demo.result``; None if there is no such view or its table is missing.

    Args:
        name: Topic and name of the view.
        content: A result file: ``tables`` and ``figures``.
    """
    tables = content["tables"]
    if name == "int8.best-tool" and "tools" in tables:
        return _compare_with_best_tool(tables["tools"], content["figures"])
    if name == "demo.result" and {"seeds", "demo"} <= set(tables):
        return _join_costs(tables["seeds"], tables["demo"])
    view = VIEWS.get(name)
    if view is None or view.table not in tables:
        return None
    rows = tables[view.table]
    if view.rows:
        rows = [row for key in view.rows for row in rows if (row["model"], row["backend"]) == key]
    return [{column: row[column] for column in view.columns} for row in rows]


def _join_costs(seeds: list[Row], runs: list[Row]) -> list[Row]:
    """Return the models with three seeds, with latency and size of the same models in the demo."""
    costs = {(row["model"], row["backend"]): {key: row[key] for key in ("ms, batch 1", "MB")} for row in runs}
    kept = (*_RUNS, "retention [95 %]")
    return [{key: row[key] for key in kept} | costs[row["model"], row["backend"]] for row in seeds]


def _compare_with_best_tool(rows: list[Row], figures: list[Row]) -> list[Row]:
    """Return a row per student: the other tool with the best recall@1, and the difference that is recorded."""
    differences = {figure["name"]: figure for figure in figures}
    view = []
    for student in dict.fromkeys(row["student"] for row in rows):
        others = [row for row in rows if row["student"] == student and not row["by"].startswith(("FP32", "ours"))]
        figure = differences[f"{student}: INT8 less the best other tool, recall@1"]
        low, high = figure["interval"]
        recall = next(column for column in others[0] if column.startswith("recall@1 ["))
        best = max(others, key=lambda row: float(row[recall].split()[0]))
        difference = f"{figure['value']:+.4f} [{low:+.4f}, {high:+.4f}]"
        view.append({"student": student, "best other tool": best["by"], "ours less theirs [95 %]": difference})
    return view
