"""Draws ``report.json``: Markdown tables, and one HTML page that needs no network."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from benchmarks.report import charts
from benchmarks.report.recommendation import conditions, notes_of, recommend, verdict
from benchmarks.report.schema import Row as Form
from benchmarks.report.tables import Column, detail_columns, extra_columns, main_columns

_TEMPLATES = Path(__file__).parent / "templates"
_KNOWN = set(Form.model_fields)
TABLES = {"models": "Every model", "details": "In detail", "more": "Also recorded"}


def tables(report: dict[str, Any]) -> dict[str, list[Column]]:
    """The columns of the report's tables, by the keys of :data:`TABLES`."""
    rows = report["rows"]
    found = {"models": main_columns(rows), "details": detail_columns(rows), "more": extra_columns(rows, _KNOWN)}
    return {name: columns for name, columns in found.items() if columns}


def draw_markdown(report: dict[str, Any]) -> str:
    """The recommendation, the tables and what could not be measured."""
    said = verdict(report)
    lines = ["# Report", "", f"**{_escape_markdown(said.headline)}.**", ""]
    lines += [_escape_markdown(f"- {name}: {value}{_after(remark)}") for name, value, remark in said.facts]
    lines += ["", said.rule, "", *[f"- {_escape_markdown(one)}" for one in said.caveats]]
    for name, columns in tables(report).items():
        headings = [column.heading for column in columns]
        lines += ["", f"## {TABLES[name]}", "", _line(headings), "|" + "---|" * len(columns)]
        lines += [_line([column.text(row) for column in columns]) for row in report["rows"]]
    notes = notes_of(report)
    if notes:
        lines += ["", "## Not measured, or doubtful", "", *[f"- {_escape_markdown(note)}" for note in notes]]
    lines += ["", _escape_markdown(conditions(report)), "", "To repeat it:", "", f"    {report['command']}", ""]
    return "\n".join(lines)


def draw_html(report: dict[str, Any]) -> str:
    """One self-contained page; every text from the report is escaped, and no other script than its own may run."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    templates = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    chosen = recommend(report)
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = {name: _rows(report, columns, chosen) for name, columns in tables(report).items()}
    return templates.get_template("report.html").render(
        report=report,
        verdict=verdict(report),
        conditions=conditions(report),
        notes=notes_of(report),
        tables=found,
        titles=TABLES,
        charts={name: Markup(one) for name, one in _charts(report, chosen).items() if one},
        calibrations=[(one["name"], Markup(charts.calibration(one))) for one in report["calibrations"]],
        decisions=[(one, Markup(charts.trials(one)), Markup(charts.sensitivity(one))) for one in report["decisions"]],
        steps=_steps(report["rerank"]),
        script=Markup(script),
        digest=digest,
    )


def _charts(report: dict[str, Any], chosen: dict[str, Any] | None) -> dict[str, str]:
    return {
        "latency": charts.by_latency(report, chosen),
        "size": charts.by_size(report, chosen),
        "category": charts.by_category(report, chosen),
    }


def _rows(report: dict[str, Any], columns: list[Column], chosen: dict[str, Any] | None) -> dict[str, Any]:
    """Headings, and for each row its class and its cells: text and what it is sorted by."""
    return {
        "headings": [column.heading for column in columns],
        "rows": [
            {
                "stage": row["stage"],
                "chosen": row is chosen,
                "cells": [{"text": column.text(row), "sort": _sort_key(column.value(row))} for column in columns],
            }
            for row in report["rows"]
        ],
    }


def _steps(rerank: dict[str, Any]) -> str:
    """The re-ranking steps that were taken, in words."""
    found = ["centring"] if rerank["centre"] and not rerank["whiten"] else []
    found += [f"whitening to {rerank['whiten']} dimensions"] if rerank["whiten"] else []
    found += [f"database augmentation by {rerank['dba']} neighbours"] if rerank["dba"] else []
    found += [f"query expansion by {rerank['qe']} neighbours"] if rerank["qe"] else []
    sizes = ", ".join(f"{name} {rerank[name]}" for name in ("k1", "k2", "weight"))
    found += [f"k-reciprocal re-ranking ({sizes})"] if rerank["k_reciprocal"] else []
    return ", ".join(found) or "no steps"


def _sort_key(value: float | str | None) -> str:
    return "" if value is None else str(value)


def _after(remark: str) -> str:
    return f" ({remark})" if remark else ""


def _line(values: list[str]) -> str:
    return "| " + " | ".join(_escape_markdown(value) for value in values) + " |"


def _escape_markdown(text: str) -> str:
    # No tags, and neither links nor images, which would be fetched from wherever a name says.
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(").replace("\n", " ")
