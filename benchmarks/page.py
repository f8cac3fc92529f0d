"""Draws ``report.json``: a Markdown table, and one HTML page that needs no network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).parent / "templates"
_COLOURS = {
    "torch": "#1f77b4",
    "onnxruntime-cpu": "#2a9d5c",
    "openvino": "#7a4fd0",
    "tensorrt": "#d1495b",
    "tensorrt-rtx": "#d1495b",
}
_MARKERS = {"fp32": "o", "fp16": "s", "int8": "^"}


def recommend(report: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest row at batch 1 whose recall@1 is within ``drop`` of the FP32 student's.

    Only what was measured here can be recommended: rows without recall or latency are passed over, and
    so is the teacher, which the student replaces.
    """
    student = next((row for row in report["rows"] if row["stage"] == "student"), None)
    if student is None or student["recall_at_1"] is None:
        return None
    floor = student["recall_at_1"] - report["drop"]
    usable = [
        row
        for row in report["rows"]
        if row["stage"] in ("student", "onnx", "engine")
        and row["recall_at_1"] is not None
        and row["recall_at_1"] >= floor
        and milliseconds(row) is not None
    ]
    return min(usable, key=lambda row: milliseconds(row) or 0.0, default=None)


def milliseconds(row: dict[str, Any], batch: str = "1") -> float | None:
    """p50 of a row at a batch size, or None."""
    found = (row["latency_ms"] or {}).get(batch)
    return None if found is None else float(found["p50"])


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text: model, backend, precision, recall and its interval, retention, cosine, latency, size."""
    recall = "–" if row["recall_at_1"] is None else f"{row['recall_at_1']:.3f}"
    interval = "" if row["ci95"] is None else f" [{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}]"
    return [
        row["name"],
        row["backend"] or "–",
        row["precision"] or "–",
        recall + interval,
        _number(row["recall_at_5"], "{:.3f}"),
        _number(row["map_at_1000"], "{:.3f}"),
        _number(row["retention"], "{:.2f}"),
        _number(row["cosine_mean"], "{:.5f}"),
        _number(milliseconds(row), "{:.2f}"),
        _number(milliseconds(row, "8"), "{:.2f}"),
        _number(None if row["size_bytes"] is None else row["size_bytes"] / 1e6, "{:.1f}"),
    ]


HEADINGS = [
    "model",
    "backend",
    "precision",
    "recall@1 [95 %]",
    "recall@5",
    "mAP@1000",
    "retention",
    "cosine to student",
    "ms, batch 1",
    "ms, batch 8",
    "MB",
]


def draw_markdown(report: dict[str, Any]) -> str:
    """The table, the recommendation and what could not be measured."""
    lines = ["# Report", "", verdict(report), "", "| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    lines += ["| " + " | ".join(_escape_markdown(cell) for cell in cells(row)) + " |" for row in report["rows"]]
    notes = notes_of(report)
    if notes:
        lines += ["", "Not measured:", "", *[f"- {_escape_markdown(note)}" for note in notes]]
    return "\n".join([*lines, "", conditions(report), ""])


def draw_html(report: dict[str, Any]) -> str:
    """One self-contained page; every text from the report is escaped."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    templates = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    chosen = recommend(report)
    rows = [{"cells": cells(row), "chosen": row is chosen, "stage": row["stage"]} for row in report["rows"]]
    return templates.get_template("report.html").render(
        verdict=verdict(report),
        conditions=conditions(report),
        headings=HEADINGS,
        rows=rows,
        notes=notes_of(report),
        plot=Markup(draw_plot(report)),
        sheet=report["sheet"],
        environment=report["environment"],
    )


def verdict(report: dict[str, Any]) -> str:
    """One sentence: which model to deploy on this machine, and on what evidence."""
    chosen = recommend(report)
    if chosen is None:
        return "No model has both recall and latency here, so none can be recommended."
    low, high = chosen["ci95"]
    return (
        f"Deploy {chosen['name']} on {chosen['backend']} ({chosen['precision']}): recall@1 {chosen['recall_at_1']:.3f} "
        f"(95 % interval {low:.3f} to {high:.3f}), {milliseconds(chosen):.2f} ms per picture at batch 1. It is the "
        f"fastest measured here whose recall@1 is within {report['drop']} of the FP32 student's."
    )


def conditions(report: dict[str, Any]) -> str:
    """What the numbers hold for."""
    environment, catalog = report["environment"], report["catalog"]
    row = next((row for row in report["rows"] if row["queries"]), {"queries": 0, "gallery": 0})
    cpu = environment["cpu"]
    gpus = ", ".join(gpu["name"] for gpu in environment["gpus"]) or "no GPU"
    products = catalog["products"][catalog["split"]]
    return (
        f"{row['queries']} queries against {row['gallery']} gallery pictures of {products} products "
        f"({catalog['split']} split of {', '.join(catalog['sources'])}). Intervals: bootstrap over queries. "
        f"Latency: p50 on {cpu['model']}, {report['threads']} threads, {gpus}."
    )


def notes_of(report: dict[str, Any]) -> list[str]:
    """What could not be measured, and why."""
    missing = [row for row in report["rows"] if row["latency_ms"] is None and row["stage"] != "baseline"]
    return [f"{row['name']} ({row['backend']}): {row['notes']}" for row in missing]


def draw_plot(report: dict[str, Any]) -> str:
    """Recall@1 with its interval against milliseconds at batch 1, as inline SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    drawn = [row for row in report["rows"] if row["recall_at_1"] is not None]
    for row in drawn:
        latency, recall = milliseconds(row), row["recall_at_1"]
        if latency is None:
            continue
        low, high = row["ci95"]
        axes.errorbar(
            [latency],
            [recall],
            yerr=[[max(0.0, recall - low)], [max(0.0, high - recall)]],
            fmt=_MARKERS.get(row["precision"], "D"),
            color=_COLOURS.get(row["backend"], "grey"),
            capsize=2,
            markersize=7,
            alpha=0.9,
            label=f"{row['name']}, {row['backend']}",
        )
    for row in (row for row in drawn if row["stage"] == "baseline"):
        axes.axhline(row["recall_at_1"], color="grey", linestyle=":", linewidth=1)
        axes.annotate(row["name"], (1, row["recall_at_1"]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("milliseconds per picture, batch 1 (p50, log scale)")
    axes.set_ylabel("recall@1, 95 % interval")
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7, frameon=False)
    stream = io.StringIO()
    # A fixed salt makes the same report give the same page.
    with mpl.rc_context({"svg.hashsalt": "vpr", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _escape_markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
