"""Charts of the report as inline SVG, drawn for the width of a phone."""

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

from benchmarks.report.recommendation import timed_batches
from benchmarks.report.schema import Calibration, Interval, LayerDecision, Report, Row, Skew
from benchmarks.report.storage_schema import Storage
from vpr.retrieval.config import VECTOR_FORMATS, IndexKind

_WIDTH = 4.5  # inches; at 72 points each and 9-point text, legible at 390 pixels
_MARKERS = {"fp32": "o", "bf16": "D", "fp16": "s", "int8": "^", "int8-mixed": "v", "fp8": "P"}
_INDEX_MARKERS: dict[IndexKind, str] = {"flat": "o", "hnsw": "^", "ivf": "s", "shortlist": "D", "ivf-shortlist": "P"}
_ERROR_BARS = {"elinewidth": 0.7, "ecolor": "#333333"}
_BAR_COLOURS = ("#b8c4d6", "#1f77b4", "#e08a1e")
_MAX_CATEGORIES = 12
_MAX_LABEL = 26  # characters of a name on an axis
_LABEL_DISTANCE = 0.035  # share of the axes: closer points have one label
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a product named $x$ is not a formula
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@mpl.rc_context(_STYLE)
def draw_latency(report: Report, chosen: Row | None) -> str:
    """Draw recall@1 against p50 at the smallest batch; empty without latencies."""
    batches = timed_batches(report.rows)
    if not batches:
        return ""
    values = [row.milliseconds(batches[0]) for row in report.rows]
    return _tradeoff(report.rows, values, f"ms per call, batch {batches[0]} (p50, log scale)", chosen)


@mpl.rc_context(_STYLE)
def draw_size(report: Report, chosen: Row | None) -> str:
    """Draw recall@1 against the size of the model file."""
    values = [None if row.size_bytes is None else row.size_bytes / 1e6 for row in report.rows]
    return _tradeoff(report.rows, values, "MB (log scale)", chosen)


@mpl.rc_context(_STYLE)
def draw_categories(report: Report, chosen: Row | None) -> str:
    """Draw recall@1 by category of teacher, FP32 student and recommended model; empty without categories."""
    teacher = next((row for row in report.rows if row.stage == "teacher"), None)
    rows: list[Row] = []
    for row in (teacher, report.reference, chosen):
        if row and row.by_category and not any(row is other for other in rows):
            rows.append(row)
    if not rows:
        return ""
    names = list(rows[0].by_category or {})[:_MAX_CATEGORIES]
    figure, axes = _figure(0.9 + len(names) * (0.14 + 0.13 * len(rows)))
    height = 0.8 / len(rows)
    for index, row in enumerate(rows):
        categories = [(row.by_category or {})[name] for name in names]
        recalls = [category.recall_at_1 for category in categories]
        lines = [line + (index - (len(rows) - 1) / 2) * height for line in range(len(names))]
        ends = _errors(recalls, [category.ci95 for category in categories])
        style: dict[str, Any] = {"color": _BAR_COLOURS[index], "error_kw": _ERROR_BARS, "label": row.title}
        axes.barh(lines, recalls, height * 0.9, xerr=ends, **style)
    shown = [(rows[0].by_category or {})[name] for name in names]
    sizes = [f"({category.queries}, {category.products})" for category in shown]
    labels = [f"{_shorten(name)} {size}" for name, size in zip(names, sizes, strict=True)]
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("recall@1 (in brackets: queries, products; fewer than 10 products have no interval)")
    axes.set_xlim(left=0)
    _legend(figure, axes, 1)
    return _svg(figure, "recall by category")


@mpl.rc_context(_STYLE)
def draw_calibration(calibration: Calibration) -> str:
    """Draw the threshold of each method as a share of the tensor's largest value; the chosen method is filled."""
    tensors = calibration.tensors
    figure, axes = _figure(1.0 + 0.17 * len(tensors))
    for index, method in enumerate(tensors[0].thresholds):
        colour = f"C{index}"
        for is_chosen in (False, True):
            lines = [line for line, tensor in enumerate(tensors) if (tensor.method == method) is is_chosen]
            values = [tensors[line].thresholds[method] / tensors[line].largest for line in lines]
            face = colour if is_chosen else "none"
            axes.scatter(values, lines, s=22 if is_chosen else 14, facecolors=face, edgecolors=colour, linewidths=0.9)
        axes.scatter([], [], s=22, color=colour, label=method)
    axes.set_yticks(range(len(tensors)), [_shorten(tensor.name) for tensor in tensors], fontsize=7)
    axes.set_ylim(len(tensors) - 0.4, -0.6)
    axes.set_xlim(0, 1.05)
    axes.set_xlabel("threshold / largest value")
    axes.grid(alpha=0.3)
    _legend(figure, axes, 3)
    return _svg(figure, f"calibration of {calibration.name}")


@mpl.rc_context(_STYLE)
def draw_sensitivity(decision: LayerDecision) -> str:
    """Draw the cost of each layer when only that layer is quantised; empty if no layer was tried alone."""
    trials = decision.single_layer_trials
    if not trials:
        return ""
    figure, axes = _figure(1.0 + 0.17 * len(trials))
    names = [trial.quantised[0] for trial in trials]
    losses = [max(1 - trial.cosine, 1e-9) for trial in trials]
    for is_excluded, colour, label in ((False, "#7a4fd0", "quantised"), (True, "#d1495b", "in the base precision")):
        lines = [line for line, name in enumerate(names) if (name not in decision.quantised) is is_excluded]
        axes.barh(lines, [losses[line] for line in lines], color=colour, height=0.7, label=label)
    start = len(os.path.commonprefix(names).rpartition(".")[0])
    axes.set_yticks(range(len(names)), [_shorten(name[start:].lstrip(".")) for name in names], fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log")
    _plain_ticks(axes, (1,))
    axes.set_xlabel("1 - cosine to FP32, only this layer quantised (log scale)")
    _legend(figure, axes, 2)
    return _svg(figure, f"sensitivity of {decision.name}")


@mpl.rc_context(_STYLE)
def draw_trials(decision: LayerDecision) -> str:
    """Draw the drop of every tested set of layers against its size: bars end at the upper bound; dashes: the budget."""
    figure, axes = _figure(2.9)
    sizes, drops = [len(trial.quantised) for trial in decision.trials], [trial.drop for trial in decision.trials]
    axes.plot(sizes, drops, "o", color="#b9a6e3", markersize=4, label="search")
    for step in decision.sequence:
        colour = "#1d7f4a" if step.confirmed else "#d1495b"
        error = [[0.0], [max(step.upper_bound - step.drop, 0.0)]]
        axes.errorbar([len(step.quantised)], [step.drop], yerr=error, fmt="o", color=colour, markersize=4, capsize=2)
    axes.plot([], [], "o", color="#1d7f4a", label="confirmed")
    axes.plot([], [], "o", color="#d1495b", label="not confirmed")
    axes.axvline(len(decision.quantised), color="k", linewidth=0.6, linestyle=":")
    axes.axhline(decision.max_recall_drop, color="#d1495b", linestyle="--", linewidth=1)
    axes.set_xlabel("quantised layers (dotted: chosen, dashes: budget)")
    axes.set_ylabel("drop of recall@1, validation")
    axes.grid(alpha=0.3)
    _legend(figure, axes, 3)
    return _svg(figure, f"sets of layers tried for {decision.name}")


def _tradeoff(rows: list[Row], values: Sequence[float | None], label: str, chosen: Row | None) -> str:
    """Draw recall@1 against a cost. Points have the row's number in the table; the line is the Pareto front."""
    points = [
        (number, row, value, row.recall_at_1, row.ci95)
        for number, (row, value) in enumerate(zip(rows, values, strict=True), start=1)
        if value is not None and row.recall_at_1 is not None
    ]
    if not points:
        return ""
    figure, axes = _figure(3.7)
    labels: set[str] = set()
    backends = list(dict.fromkeys(row.backend for row in rows if row.backend))
    for _, row, value, recall, interval in points:
        name, marker = f"{row.backend} {row.precision}", _MARKERS.get(row.precision or "", "X")
        style: dict[str, Any] = {"label": "" if name in labels else name, "capsize": 2, "elinewidth": 0.7}
        style["color"] = f"C{backends.index(row.backend) % 10}" if row.backend else "C7"
        axes.errorbar([value], [recall], yerr=_errors([recall], [interval]), fmt=marker, **style)
        labels.add(name)
        if row is chosen:
            axes.plot([value], [recall], "o", markersize=14, markerfacecolor="none", color="#1d7f4a", linewidth=2)
    front = _pareto_front([(value, recall) for _, _, value, recall, _ in points])
    axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    _plain_ticks(axes, (1, 2, 5))
    axes.set_xlabel(label)
    axes.set_ylabel("recall@1, 95 % interval")
    axes.grid(alpha=0.25, which="both")
    _number_points(axes, [(number, value, recall) for number, _, value, recall, _ in points])
    _legend(figure, axes, 2)
    return _svg(figure, f"recall against {label}")


def _pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats in both cost and recall, cheapest first."""
    best, front = -math.inf, []
    for cost, recall in sorted(points, key=lambda point: (point[0], -point[1])):
        if recall > best:
            best = recall
            front.append((cost, recall))
    return front


@mpl.rc_context(_STYLE)
def draw_skew(skew: Skew) -> str:
    """Draw recall@1 of the queries by each pipeline; the line is that of the card."""
    rows = skew.rows
    figure, axes = _figure(0.7 + 0.2 * len(rows))
    recalls = [row.recall_at_1 for row in rows]
    colours = [_BAR_COLOURS[1 if row.agrees else 2] for row in rows]
    style: dict[str, Any] = {"color": colours, "error_kw": _ERROR_BARS}
    axes.barh(range(len(rows)), recalls, 0.7, xerr=_errors(recalls, [row.ci95 for row in rows]), **style)
    axes.axvline(recalls[0], color="#333333", linewidth=0.7)
    axes.set_yticks(range(len(rows)), [_shorten(row.pipeline) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("recall@1 of queries by this pipeline, gallery by the card")
    axes.set_xlim(left=0)
    return _svg(figure, f"skew {skew.name}")


@mpl.rc_context(_STYLE)
def draw_storage(storage: Storage, size: int) -> str:
    """Draw recall@1 against bytes per vector in one gallery; empty if nothing was measured.

    The line is the Pareto front, with the dimensions of its settings. A circle marks the cheapest confirmed setting.
    """
    rows = [row for row in storage.rows if row.size == size]
    points = [
        (row, row.bytes_per_vector, row.recall_at_1)
        for row in rows
        if row.bytes_per_vector is not None and row.recall_at_1 is not None
    ]
    if not points:
        return ""
    figure, axes = _figure(3.9)
    for row, cost, recall in points:
        style: dict[str, Any] = {"color": f"C{VECTOR_FORMATS.index(row.format)}", "capsize": 2, "elinewidth": 0.4}
        marker = _INDEX_MARKERS[row.index]
        axes.errorbar([cost], [recall], yerr=_errors([recall], [row.ci95]), fmt=marker, markersize=5, **style)
    for name in dict.fromkeys(row.format for row, *_ in points):
        axes.plot([], [], "s", color=f"C{VECTOR_FORMATS.index(name)}", label=name)
    for index in dict.fromkeys(row.index for row, *_ in points):
        axes.plot([], [], _INDEX_MARKERS[index], color="#555555", label=index)
    front = _pareto_front([(cost, recall) for _, cost, recall in points])
    axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0)
    if (chosen := storage.chosen(size)) and chosen.bytes_per_vector and chosen.recall_at_1 is not None:
        ring: dict[str, Any] = {"markersize": 14, "markerfacecolor": "none", "color": "#1d7f4a", "linewidth": 2}
        axes.plot([chosen.bytes_per_vector], [chosen.recall_at_1], "o", **ring)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    _plain_ticks(axes, (1, 2, 5))
    for row, cost, recall in points:
        if (cost, recall) in front:
            axes.annotate(str(row.dims), (cost, recall), (5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"bytes per vector in a gallery of {size:,} (log scale); numbers: dimensions")
    axes.set_ylabel("recall@1, 95 % interval")
    axes.grid(alpha=0.25, which="both")
    _legend(figure, axes, 4)
    return _svg(figure, f"storage {storage.name} {size}")


def _number_points(axes: Axes, points: list[tuple[int, float, float]]) -> None:
    """Write each point's number next to it; points at the same position share a label."""
    axes.autoscale_view()  # otherwise the limits are computed when drawing, after the labels
    to_axes = axes.transScale + axes.transLimits
    groups: list[tuple[tuple[float, float], list[int]]] = []
    for number, x, y in points:
        position = to_axes.transform((x, y))
        near = (numbers for at, numbers in groups if max(abs(to_axes.transform(at) - position)) < _LABEL_DISTANCE)
        if (group := next(near, None)) is None:
            groups.append(((x, y), group := []))
        group.append(number)
    for at, numbers in groups:
        axes.annotate(", ".join(map(str, numbers)), at, (7, 4), textcoords="offset points", fontsize=8)


def _plain_ticks(axes: Axes, multiples: tuple[int, ...]) -> None:
    """Label these multiples of the powers of ten as plain numbers: Matplotlib's default labels are formulas."""
    axes.xaxis.set_major_locator(LogLocator(subs=multiples))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _errors(values: Sequence[float], intervals: Sequence[Interval | None]) -> list[list[float]]:
    """Return the lengths of error bars, 0 without an interval."""
    both = [(value, interval or (value, value)) for value, interval in zip(values, intervals, strict=True)]
    return [[max(0.0, v - low) for v, (low, _) in both], [max(0.0, high - v) for v, (_, high) in both]]


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_LABEL else f"{text[: _MAX_LABEL // 2]}…{text[-(_MAX_LABEL // 2 - 1) :]}"


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _svg(figure: Figure, name: str) -> str:
    stream = io.StringIO()
    # A fixed salt makes the page reproducible; one salt per chart makes the ids of a page unique.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text[text.index("<svg") :])
    return text.replace("<svg ", '<svg role="img" ', 1)
