"""Rendering of ``report.json``: Markdown tables, and one HTML page that needs no network."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.recall.seen_marks import seen_notes
from benchmarks.report import charts
from benchmarks.report.part import SeenCounts
from benchmarks.report.recommendation import build_verdict, collect_notes, describe_conditions, recommend
from benchmarks.report.rivals import compare_rivals
from benchmarks.report.schema import Report, Row
from benchmarks.report.storage_schema import Storage
from benchmarks.report.tables import (
    SKEW_HEADINGS,
    STORAGE_HEADINGS,
    Column,
    describe_skew,
    describe_storage,
    detail_columns,
    extra_columns,
    main_columns,
    skew_cells,
    storage_cells,
)

_TEMPLATES = Path(__file__).parent / "templates"
TABLES = {"models": "Models", "details": "Details", "more": "Other measurements"}


def tables(report: Report) -> dict[str, list[Column]]:
    """Return the columns of the report's tables, by the keys of :data:`TABLES`."""
    rows = report.rows
    columns = {"models": main_columns(rows), "details": detail_columns(rows), "more": extra_columns(rows)}
    return {name: table for name, table in columns.items() if table}


def draw_markdown(report: Report) -> str:
    """Return the recommendation, the tables and the notes as Markdown."""
    verdict = build_verdict(report)
    lines = ["# Report", "", f"**{_escape_markdown(verdict.headline)}.**", ""]
    lines += [_escape_markdown(f"- {name}: {value}{_in_brackets(remark)}") for name, value, remark in verdict.facts]
    lines += ["", verdict.rule, "", *[f"- {_escape_markdown(caveat)}" for caveat in verdict.caveats]]
    if rivals := compare_rivals(report):
        lines += ["", "## Was distilling worth it?", "", "The FP32 student is:", ""]
        lines += [_escape_markdown(f"- {rival.text}") for rival in rivals]
    for name, columns in tables(report).items():
        headings = [column.heading for column in columns]
        lines += ["", f"## {TABLES[name]}", "", markdown_line(headings), "|" + "---|" * len(columns)]
        lines += [markdown_line([column.text(row) for column in columns]) for row in report.rows]
    for skew in report.skews:
        lines += ["", f"## {_escape_markdown(describe_skew(skew))}", "", markdown_line(SKEW_HEADINGS)]
        lines += ["|" + "---|" * len(SKEW_HEADINGS), *[markdown_line(skew_cells(row)) for row in skew.rows]]
        lines += _draw_seen(skew.seen)
    for storage in report.storages:
        lines += ["", f"## {_escape_markdown(describe_storage(storage))}", "", *draw_storage_table(storage)]
    if notes := collect_notes(report.rows):
        lines += ["", "## Notes", "", *[f"- {_escape_markdown(note)}" for note in notes]]
    lines += ["", _escape_markdown(describe_conditions(report)), "", "Command:", "", f"    {report.command}", ""]
    return "\n".join(lines)


def draw_storage_table(storage: Storage) -> list[str]:
    """Return the lines of the statements and the table of storage settings as Markdown."""
    lines = [_escape_markdown(f"- {decision.size:,} vectors: {decision.outcome}") for decision in storage.decisions]
    lines += ["", markdown_line(STORAGE_HEADINGS), "|" + "---|" * len(STORAGE_HEADINGS)]
    lines += [markdown_line(storage_cells(row)) for row in storage.rows]
    return [*lines, *_draw_seen(storage.seen)]


def _draw_seen(seen: SeenCounts | None) -> list[str]:
    """Return the lines after a table that mark what its model has seen."""
    notes = [f"- {_escape_markdown(note)}" for note in seen_notes(seen)]
    return ["", *notes] if notes else []


def draw_html(report: Report) -> str:
    """Return one self-contained page. Texts of the report are escaped, and only the page's script may run."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    templates = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    chosen = recommend(report)
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    drawn = {"latency": charts.draw_latency(report, chosen), "size": charts.draw_size(report, chosen)}
    drawn["category"] = charts.draw_categories(report, chosen)
    return templates.get_template("report.html").render(
        report=report,
        environment=report.environment.to_json(),
        verdict=build_verdict(report),
        conditions=describe_conditions(report),
        rivals=compare_rivals(report),
        notes=collect_notes(report.rows),
        tables={name: _cells(report.rows, columns, chosen) for name, columns in tables(report).items()},
        titles=TABLES,
        charts={name: Markup(chart) for name, chart in drawn.items() if chart},
        calibrations=[(ranges.name, Markup(charts.draw_calibration(ranges))) for ranges in report.calibrations],
        decisions=[
            (decision, Markup(charts.draw_trials(decision)), Markup(charts.draw_sensitivity(decision)))
            for decision in report.decisions
        ],
        skews=[
            {
                "title": describe_skew(skew),
                "chart": Markup(charts.draw_skew(skew)),
                "rows": list(map(skew_cells, skew.rows)),
                "notes": seen_notes(skew.seen),
            }
            for skew in report.skews
        ],
        skew_headings=SKEW_HEADINGS,
        storages=[
            {
                "title": describe_storage(storage),
                "statements": [f"{decision.size:,} vectors: {decision.outcome}" for decision in storage.decisions],
                "charts": [Markup(charts.draw_storage(storage, gallery.size)) for gallery in storage.galleries],
                "rows": list(map(storage_cells, storage.rows)),
                "notes": seen_notes(storage.seen),
            }
            for storage in report.storages
        ],
        storage_headings=STORAGE_HEADINGS,
        steps=_describe_steps(report.rerank),
        script=Markup(script),
        digest=digest,
    )


def _cells(rows: Sequence[Row], columns: list[Column], chosen: Row | None) -> dict[str, Any]:
    """Return the headings, and for each row its class and its cells: text and sort key."""
    return {
        "headings": [column.heading for column in columns],
        "rows": [
            {
                "stage": row.stage,
                "chosen": row is chosen,
                "cells": [{"text": column.text(row), "sort": _sort_key(column.value(row))} for column in columns],
            }
            for row in rows
        ],
    }


def _describe_steps(rerank: dict[str, Any]) -> str:
    """Return the re-ranking steps in words."""
    steps = ["centring"] if rerank["centre"] and not rerank["whiten"] else []
    steps += [f"whitening to {rerank['whiten']} dimensions"] if rerank["whiten"] else []
    steps += [f"database augmentation with {rerank['dba']} neighbours"] if rerank["dba"] else []
    steps += [f"query expansion with {rerank['qe']} neighbours"] if rerank["qe"] else []
    sizes = ", ".join(f"{name} {rerank[name]}" for name in ("k1", "k2", "original_weight"))
    steps += [f"k-reciprocal re-ranking ({sizes})"] if rerank["k_reciprocal"] else []
    return ", ".join(steps) or "no steps"


def _sort_key(value: float | str | None) -> str:
    return "" if value is None else str(value)


def _in_brackets(remark: str) -> str:
    return f" ({remark})" if remark else ""


def markdown_line(values: Sequence[str]) -> str:
    """Return a line of a Markdown table with escaped cells."""
    return "| " + " | ".join(_escape_markdown(value) for value in values) + " |"


def _escape_markdown(text: str) -> str:
    # No tags, and no links or images: a viewer would fetch an image from any address in a name.
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(").replace("\n", " ")
