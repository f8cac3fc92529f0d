"""Retention and cost of students of four sizes, each initialised from the next larger one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.latency.measure import time_models
from experiments.figures import Figure, Row
from experiments.intervals import interval_text
from experiments.student.ablation import (
    SMALL,
    Scores,
    Setting,
    compute_retention,
    distillation,
    score_students,
    score_teacher,
)
from export.config import OnnxConfig
from export.to_onnx import export_onnx
from student.distill import distill
from vpr.artifacts.store import Artifact, load_artifact
from vpr.data.catalog import load_catalog
from vpr.inference.model_size import count_multiply_adds
from vpr.retrieval.intervals import Interval

# From the largest down: each starts with weights selected from the larger one, the best variant of the ablation.
_HEADS = {256: 4, 192: 3, 128: 2, 96: 2}
SIZES = {width: replace(SMALL, dim=width, heads=heads, mlp_dim=2 * width) for width, heads in _HEADS.items()}
# Goal of the retention by the largest share of the teacher's multiply-adds.
GOALS = {0.5: 0.95, 0.25: 0.90}
_SECONDS = 3.0


@dataclass(frozen=True)
class Point:
    """Student of the curve.

    Attributes:
        width: Width of its tokens.
        parameters: Number of parameters.
        multiply_adds: Multiply-adds of one image.
        share: Share of the teacher's multiply-adds.
        recall: Recall@1.
        retention: Retention and its interval.
        torch: Milliseconds of one image in PyTorch.
        openvino: Milliseconds of one image in OpenVINO, FP32.
        seconds: Seconds of its training on the CPU.
        ladder: Seconds of its training and of those of all larger students.
    """

    width: int
    parameters: int
    multiply_adds: int
    share: float
    recall: float
    retention: tuple[float, Interval | None]
    torch: float
    openvino: float
    seconds: float
    ladder: float

    @property
    def row(self) -> Row:
        """Row of the table."""
        return {
            "width": self.width,
            "parameters": f"{self.parameters / 1e6:.2f} M",
            "multiply-adds": f"{self.multiply_adds / 1e6:.1f} M",
            "of the teacher's": f"{self.share:.0%}",
            "recall@1": f"{self.recall:.3f}",
            "retention [95 %]": f"{self.retention[0]:.2f}{interval_text(self.retention[1], '.2f')}",
            "ms, PyTorch": f"{self.torch:.2f}",
            "ms, OpenVINO": f"{self.openvino:.2f}",
            "training, s": f"{self.seconds:.0f}",
            "with those before, s": f"{self.ladder:.0f}",
        }


def size_curve(setting: Setting, plot: Path) -> tuple[list[Figure], list[Row]]:
    """Distil each size with the default losses, score and time it, and draw retention against cost.

    Args:
        setting: Teacher, catalogue and budget.
        plot: SVG file to write.

    Returns:
        Retention of the largest student within each share of the teacher's multiply-adds, and the table.
    """
    test = load_catalog(setting.catalog).select(split="test")
    model, artifact, teacher = score_teacher(setting, test)
    assert artifact.card.preprocess is not None
    teacher_adds = count_multiply_adds(model, artifact.card.preprocess.size)
    students = train_ladder(setting)
    graphs = {width: _export(path) for width, path in students.items()}
    paths = (str(setting.teacher), *map(str, (*students.values(), *graphs.values())))
    timed = time_models(paths, (1,), _SECONDS, 1, starts=0)
    times = {name: timing.latency_ms["1"].p50 for name, timing in timed.items() if timing.latency_ms}
    points: list[Point] = []
    for width, path in students.items():
        milliseconds = times[f"{path.name} (torch)"], times[f"{graphs[width].name} (openvino)"]
        scores = score_students([path], test)
        retention = compute_retention(scores.hits, teacher)
        points.append(
            _point(width, path, scores, retention, teacher_adds, milliseconds, points[-1].ladder if points else 0.0)
        )
    draw(points, plot)
    row = _teacher_row(artifact, teacher_adds, teacher.recall_at_1, times[f"{artifact.card.name} (torch)"])
    figures = [_retention_figure(points, share, goal, setting) for share, goal in GOALS.items()]
    return figures, [row, *(point.row for point in points)]


def _point(
    width: int,
    path: Path,
    scores: Scores,
    retention: tuple[float, Interval | None],
    teacher_adds: int,
    milliseconds: tuple[float, float],
    ladder: float,
) -> Point:
    """Return the point of a student; ``ladder`` are the seconds of all larger students."""
    metrics = load_artifact(path).card.metrics
    return Point(
        width=width,
        parameters=metrics["parameters"],
        multiply_adds=metrics["multiply_adds"],
        share=metrics["multiply_adds"] / teacher_adds,
        recall=scores.by_seed[0].recall_at_1,
        retention=retention,
        torch=milliseconds[0],
        openvino=milliseconds[1],
        seconds=scores.seconds,
        ladder=scores.seconds + ladder,
    )


def _teacher_row(artifact: Artifact, multiply_adds: int, recall: float, milliseconds: float) -> Row:
    metrics = artifact.card.metrics
    return {
        "width": "the teacher",
        "parameters": f"{metrics['parameters'] / 1e6:.2f} M",
        "multiply-adds": f"{multiply_adds / 1e6:.1f} M",
        "of the teacher's": "100%",
        "recall@1": f"{recall:.3f}",
        "retention [95 %]": "",
        "ms, PyTorch": f"{milliseconds:.2f}",
        "ms, OpenVINO": "",
        "training, s": f"{metrics['seconds']:.0f}",
        "with those before, s": "",
    }


def draw(points: list[Point], path: Path) -> None:
    """Draw retention against parameters and against milliseconds as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(8, 3.2), layout="constrained")
    axes = drawing.subplots(1, 2, sharey=True)
    retentions = [point.retention[0] for point in points]
    lows, highs = zip(*(point.retention[1] or (point.retention[0],) * 2 for point in points), strict=True)
    errors = [np.subtract(retentions, lows), np.subtract(highs, retentions)]
    costs: list[tuple[Any, list[float], str]] = [
        (axes[0], [point.parameters / 1e6 for point in points], "parameters, millions"),
        (axes[1], [point.openvino for point in points], "ms per image, OpenVINO FP32, one thread"),
    ]
    for axis, cost, label in costs:
        axis.errorbar(cost, retentions, errors, marker="o", capsize=3, color="#1f5fa8")
        for point, x in zip(points, cost, strict=True):
            label_style = {"textcoords": "offset points", "xytext": (0, 3), "ha": "center", "fontsize": 8}
            axis.annotate(f"{point.width} wide", (x, highs[points.index(point)]), **label_style)
        axis.set_xlabel(label)
        axis.margins(x=0.15, y=0.12)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("recall@1 over the teacher's")
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "vpr", "svg.fonttype": "none"}):
        drawing.savefig(path, format="svg", metadata={"Date": None})


def _retention_figure(points: list[Point], share: float, goal: float, setting: Setting) -> Figure:
    best = max((point for point in points if point.share <= share), key=lambda point: point.share)
    name = f"{setting.name}: retention at {best.share:.0%} of the teacher's multiply-adds (at most {share:.0%})"
    return Figure(name, best.retention[0], "", goal, ">=", setting.command, best.retention[1], (0,))


def train_ladder(setting: Setting) -> dict[int, Path]:
    """Train a student of each size, each initialised with weights selected from the next larger one."""
    students: dict[int, Path] = {}
    larger = ""
    for width, model in SIZES.items():
        config = distillation(setting, setting.folder / f"width-{width}", model, 0)
        path = distill(replace(config, start=larger))
        assert path is not None
        students[width], larger = path, str(path)
    return students


def _export(student: Path) -> Path:
    return export_onnx(OnnxConfig(str(student), f"{student}-fp32"))
