"""The report's charts as inline SVG, drawn for the width of a phone."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.report.recommendation import Row, batches, milliseconds, reference, title

_WIDTH = 4.5  # inches; at 72 points each and 9-point text, legible at 390 pixels
_MARKERS = {"fp32": "o", "bf16": "D", "fp16": "s", "int8": "^", "int8-mixed": "v", "fp8": "P"}
_CATEGORIES = 12
_LONGEST = 26  # characters of a name on an axis
_NEAR = 0.035  # of the axes: points this close share one label
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a product named $x$ is not a formula
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@mpl.rc_context(_STYLE)
def by_latency(report: Row, chosen: Row | None) -> str:
    """Recall@1 against p50 at the smallest batch; empty where nothing was timed."""
    found = batches(report["rows"])
    if not found:
        return ""
    values = [milliseconds(row, found[0]) for row in report["rows"]]
    return _tradeoff(report["rows"], values, f"ms per call, batch {found[0]} (p50, log scale)", chosen)


@mpl.rc_context(_STYLE)
def by_size(report: Row, chosen: Row | None) -> str:
    """Recall@1 against the size of the file."""
    values = [None if row["size_bytes"] is None else row["size_bytes"] / 1e6 for row in report["rows"]]
    return _tradeoff(report["rows"], values, "MB (log scale)", chosen)


@mpl.rc_context(_STYLE)
def by_category(report: Row, chosen: Row | None) -> str:
    """Bars of recall@1 by category: teacher, FP32 student and what is recommended; empty without categories."""
    teacher = next((row for row in report["rows"] if row["stage"] == "teacher"), None)
    shown = [row for row in (teacher, reference(report), chosen) if row and row["by_category"]]
    shown = [row for place, row in enumerate(shown) if row not in shown[:place]]
    if not shown:
        return ""
    names = list(shown[0]["by_category"])[:_CATEGORIES]
    figure, axes = _figure(0.9 + len(names) * (0.14 + 0.13 * len(shown)))
    high = 0.8 / len(shown)
    for place, row in enumerate(shown):
        found = [row["by_category"][name] for name in names]
        values = [one["recall_at_1"] for one in found]
        axes.barh(
            [line + (place - (len(shown) - 1) / 2) * high for line in range(len(names))],
            values,
            height=high * 0.9,
            xerr=_errors(values, [one["ci95"] for one in found]),
            color=("#b8c4d6", "#1f77b4", "#e08a1e")[place],
            error_kw={"elinewidth": 0.7, "ecolor": "#333333"},
            label=title(row),
        )
    queries = [shown[0]["by_category"][name]["queries"] for name in names]
    axes.set_yticks(range(len(names)), [f"{_short(n)} ({q})" for n, q in zip(names, queries, strict=True)])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("recall@1 (in brackets: queries)")
    axes.set_xlim(left=0)
    _legend(figure, axes, 1)
    return _svg(figure, "recall by category")


@mpl.rc_context(_STYLE)
def calibration(found: Row) -> str:
    """The range that each method keeps of what a tensor was seen to hold; the chosen one is filled."""
    tensors = found["tensors"]
    figure, axes = _figure(1.0 + 0.17 * len(tensors))
    methods = list(tensors[0]["thresholds"])
    for place, method in enumerate(methods):
        colour = f"C{place}"
        for chosen in (False, True):
            lines = [line for line, one in enumerate(tensors) if (one["method"] == method) is chosen]
            values = [tensors[line]["thresholds"][method] / tensors[line]["largest"] for line in lines]
            face = colour if chosen else "none"
            axes.scatter(values, lines, s=22 if chosen else 14, facecolors=face, edgecolors=colour, linewidths=0.9)
        axes.scatter([], [], s=22, color=colour, label=method)
    axes.set_yticks(range(len(tensors)), [_short(one["name"]) for one in tensors], fontsize=7)
    axes.set_ylim(len(tensors) - 0.4, -0.6)
    axes.set_xlim(0, 1.05)
    axes.set_xlabel("threshold over the largest value seen")
    axes.grid(alpha=0.3)
    _legend(figure, axes, 3)
    return _svg(figure, f"calibration of {found['name']}")


@mpl.rc_context(_STYLE)
def sensitivity(decision: Row) -> str:
    """What each layer costs when it alone is quantised; empty where no layer had to be tried alone."""
    alone = decision["single_layer_trials"]
    if not alone:
        return ""
    figure, axes = _figure(1.0 + 0.17 * len(alone))
    names = [one["quantised"][0] for one in alone]
    losses = [max(1 - one["cosine"], 1e-9) for one in alone]
    for kept, colour, label in ((False, "#7a4fd0", "quantised"), (True, "#d1495b", "kept in the base precision")):
        lines = [line for line, name in enumerate(names) if (name not in decision["quantised"]) is kept]
        axes.barh(lines, [losses[line] for line in lines], color=colour, height=0.7, label=label)
    start = len(os.path.commonprefix(names).rpartition(".")[0])
    axes.set_yticks(range(len(names)), [_short(name[start:].lstrip(".")) for name in names], fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log")
    _plain_ticks(axes, (1,))
    axes.set_xlabel("1 - cosine to FP32, this layer alone (log scale)")
    _legend(figure, axes, 2)
    return _svg(figure, f"sensitivity of {decision['name']}")


@mpl.rc_context(_STYLE)
def trials(decision: Row) -> str:
    """The drop of recall@1 of every set of layers that was tried, against its size; the line is the budget."""
    figure, axes = _figure(2.9)
    tried = decision["trials"]
    sizes, drops = [len(one["quantised"]) for one in tried], [one["drop"] for one in tried]
    error = _errors(drops, [one["drop_interval"] for one in tried])
    axes.errorbar(sizes, drops, yerr=error, fmt="o", color="#7a4fd0", markersize=4, capsize=2, alpha=0.8)
    axes.plot([len(decision["quantised"])], [decision["drop"]], "o", markersize=11, markerfacecolor="none", color="k")
    axes.axhline(decision["max_recall_drop"], color="#d1495b", linestyle="--", linewidth=1)
    axes.set_xlabel("layers quantised (ring: chosen, dashes: budget)")
    axes.set_ylabel("drop of recall@1, validation")
    axes.grid(alpha=0.3)
    return _svg(figure, f"sets of layers tried for {decision['name']}")


def _tradeoff(rows: list[Row], values: Sequence[float | None], label: str, chosen: Row | None) -> str:
    """Points are numbered by the row's place in the table; the line joins those that no other one beats."""
    drawn = [
        (place + 1, row, value)
        for place, (row, value) in enumerate(zip(rows, values, strict=True))
        if value is not None and row["recall_at_1"] is not None
    ]
    if not drawn:
        return ""
    figure, axes = _figure(3.7)
    seen: set[str] = set()
    backends = list(dict.fromkeys(row["backend"] for row in rows if row["backend"]))
    for _, row, value in drawn:
        recall, name = row["recall_at_1"], f"{row['backend']} {row['precision']}"
        axes.errorbar(
            [value],
            [recall],
            yerr=_errors([recall], [row["ci95"]]),
            fmt=_MARKERS.get(row["precision"], "X"),
            color=f"C{backends.index(row['backend']) % 10}",
            capsize=2,
            elinewidth=0.7,
            label="" if name in seen else name,
        )
        seen.add(name)
        if row is chosen:
            axes.plot([value], [recall], "o", markersize=14, markerfacecolor="none", color="#1d7f4a", linewidth=2)
    front = _front([(value, row["recall_at_1"]) for _, row, value in drawn])
    axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    _plain_ticks(axes, (1, 2, 5))
    axes.set_xlabel(label)
    axes.set_ylabel("recall@1, 95 % interval")
    axes.grid(alpha=0.25, which="both")
    _number(axes, [(place, value, row["recall_at_1"]) for place, row, value in drawn])
    _legend(figure, axes, 2)
    return _svg(figure, f"recall against {label}")


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points than which none is both cheaper and better, cheapest first."""
    best, found = -math.inf, []
    for cost, recall in sorted(points, key=lambda point: (point[0], -point[1])):
        if recall > best:
            best = recall
            found.append((cost, recall))
    return found


def _number(axes: Axes, points: list[tuple[int, float, float]]) -> None:
    """Write each point's number beside it; points that lie on each other share a label."""
    axes.autoscale_view()  # the limits are settled when drawing otherwise
    to_axes = axes.transScale + axes.transLimits
    groups: list[tuple[tuple[float, float], list[int]]] = []
    for place, x, y in points:
        spot = to_axes.transform((x, y))
        near = next((names for at, names in groups if max(abs(to_axes.transform(at) - spot)) < _NEAR), None)
        if near is None:
            groups.append(((x, y), [place]))
        else:
            near.append(place)
    for at, names in groups:
        axes.annotate(", ".join(map(str, names)), at, (7, 4), textcoords="offset points", fontsize=8)


def _plain_ticks(axes: Axes, of_ten: tuple[int, ...]) -> None:
    """Numbers at these multiples of the powers of ten: Matplotlib's own are formulas."""
    axes.xaxis.set_major_locator(LogLocator(subs=of_ten))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _errors(values: list[float], intervals: list[list[float]]) -> list[list[float]]:
    both = list(zip(values, intervals, strict=True))
    return [[max(0.0, v - ends[0]) for v, ends in both], [max(0.0, ends[1] - v) for v, ends in both]]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-(_LONGEST // 2 - 1) :]}"


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _svg(figure: Figure, name: str) -> str:
    stream = io.StringIO()
    # A fixed salt makes the same report give the same page, and another one for each chart no id twice.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text[text.index("<svg") :])
    return text.replace("<svg ", '<svg role="img" ', 1)
