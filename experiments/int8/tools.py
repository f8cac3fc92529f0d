"""Compare INT8 of this toolkit with other tools: same FP32 graph, same images, same queries."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.figures import Figure, Row
from experiments.intervals import drop_text, recall_text
from experiments.venv_runner import run_in_venv
from export.backends.openvino_runtime import openvino_forward
from export.config import Int8Config, OnnxConfig
from export.int8 import export_int8
from export.parity import parity
from export.to_onnx import export_onnx
from vpr.artifacts.store import load_artifact
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.imaging.preprocess import Preprocess
from vpr.inference.onnx_graph import GraphSession
from vpr.inference.onnx_session import INPUT, OUTPUT
from vpr.inference.timing import measure, summarise
from vpr.retrieval.embeddings import Forward, embed, read_batches, score_split
from vpr.retrieval.intervals import mean_interval
from vpr.retrieval.metrics import RetrievalScores

log = get_logger(__name__)

OURS, FLOAT = "ours", "FP32"
BUDGET = 0.005
BUDGETED = f"ours, within {BUDGET:g}"
# Environment of each tool; the requirements of NNCF and ModelOpt clash with those of the toolkit.
ENVIRONMENTS = {
    "onnxruntime-minmax": "",
    "onnxruntime-entropy": "",
    "onnxruntime-percentile": "",
    "modelopt-max": ".venv-modelopt",
    "modelopt-entropy": ".venv-modelopt",
    "nncf": ".venv-nncf",
}
_TARGET = "other-quantisers"
_SECONDS = 2.0
_SPEED_NOISE = 1.02  # a smaller ratio of latencies is noise
_MIN_COSINE, _MIN_RETENTION = 0.999, 0.995


@dataclass(frozen=True)
class TrainedStudent:
    """Trained student and its data.

    Attributes:
        name: Name of the data set.
        artifact: Student artifact.
        catalog: Catalogue artifact with train and test splits.
        folder: Folder for graphs and ranges.
    """

    name: str
    artifact: Path
    catalog: Path
    folder: Path


@dataclass(frozen=True)
class MeasuredGraph:
    """Scores and latencies of a graph.

    Attributes:
        scores: Scores of ONNX Runtime's embeddings on the test split.
        openvino_scores: Scores of OpenVINO's embeddings, which differ for some graphs.
        cosine_mean: Mean cosine of ONNX Runtime's embeddings to those of the toolkit's FP32 graph.
        cosine_min: Minimum of these cosines.
        openvino: Latency of one image in OpenVINO, p50 in ms.
        onnxruntime: Latency of one image in ONNX Runtime, p50 in ms.
        size: Size of the file, in bytes.
    """

    scores: RetrievalScores
    openvino_scores: RetrievalScores
    cosine_mean: float
    cosine_min: float
    openvino: float
    onnxruntime: float
    size: int


def compare_tools(student: TrainedStudent, command: str) -> tuple[list[Figure], list[Row]]:
    """Quantise a student with every tool and measure all graphs.

    Returns:
        Figures of the toolkit's default against FP32 and against the best other tool, and the table.
    """
    graphs = measure_graphs(student, quantise_with_all(student))
    default, fp32, budgeted = graphs[OURS], graphs[FLOAT], graphs[BUDGETED]
    others = {name: graph for name, graph in graphs.items() if name in ENVIRONMENTS}
    best = max(others, key=lambda name: others[name].scores.recall_at_1)
    fastest = min(others, key=lambda name: others[name].openvino)
    retention = default.scores.recall_at_1 / fp32.scores.recall_at_1
    speed = others[fastest].openvino / budgeted.openvino
    beaten_by = [name for name, graph in others.items() if not is_matched(graph, (default, budgeted))]
    if beaten_by:
        log.info(f"  {student.name}: ahead of ours in recall at their speed: {', '.join(beaten_by)}")
    title = student.name
    figures = [
        Figure(f"{title}: INT8 over FP32, recall@1", retention, "", _MIN_RETENTION, ">=", command),
        Figure(f"{title}: INT8, mean cosine to FP32", default.cosine_mean, "", _MIN_COSINE, ">=", command),
        _gain(f"{title}: INT8 less the best other tool, recall@1", default, others[best], command),
        _gain(f"{title}: {BUDGETED} less the fastest other tool, recall@1", budgeted, others[fastest], command),
        Figure(f"{title}: fastest other tool over {BUDGETED}, OpenVINO ms", speed, "times", 1, ">=", command),
        Figure(f"{title}: tools ahead of ours in recall at their speed", len(beaten_by), "", 0, "<=", command),
    ]
    return figures, [_row(student.name, name, graph, fp32) for name, graph in graphs.items()]


def is_matched(other: MeasuredGraph, graphs: Iterable[MeasuredGraph]) -> bool:
    """Return whether one of the graphs has at least the other's recall and speed on OpenVINO."""
    return any(
        graph.scores.recall_at_1 >= other.scores.recall_at_1 and graph.openvino <= _SPEED_NOISE * other.openvino
        for graph in graphs
    )


def quantise_with_all(student: TrainedStudent) -> dict[str, Path]:
    """Return ONNX files by tool; finished files are reused."""
    graphs, pixels = export_graphs(student)
    graphs[BUDGETED] = within_budget(student) / "model.onnx"
    for tool, environment in ENVIRONMENTS.items():
        graphs[tool] = student.folder / f"{tool}.onnx"
        if not graphs[tool].is_file():
            log.info(f"  {student.name}: {tool}")
            run_tool(tool, environment, graphs[FLOAT], pixels, graphs[tool])
    return graphs


def export_graphs(student: TrainedStudent) -> tuple[dict[str, Path], Path]:
    """Return the toolkit's FP32 and INT8 graphs of a student, and the file of its calibration images."""
    folder = student.folder
    folder.mkdir(parents=True, exist_ok=True)
    fp32 = export_onnx(OnnxConfig(str(student.artifact), str(folder / "fp32")))
    ranges = calibrate(CalibrateConfig(str(fp32), str(student.catalog), str(folder / "ranges")))
    int8 = export_int8(Int8Config(str(fp32), str(ranges), str(folder / "int8"), base="fp32"))
    pixels = folder / "pixels.npy"
    if not pixels.is_file():
        np.save(pixels, calibration_pixels(ranges, student), allow_pickle=False)
    return {FLOAT: fp32 / "model.onnx", OURS: int8 / "model.onnx"}, pixels


def within_budget(student: TrainedStudent) -> Path:
    """Export the fastest graph that keeps recall@1 within :data:`BUDGET` on the validation split."""
    fp32, ranges = str(student.folder / "fp32"), str(student.folder / "ranges")
    output, catalog = str(student.folder / "int8-budget"), str(student.catalog)
    return export_int8(
        Int8Config(fp32, ranges, output, base="fp32", max_recall_drop=BUDGET, catalog=catalog, threads=1)
    )


def calibration_pixels(ranges: Path, student: TrainedStudent) -> NDArray[np.float32]:
    """Return the calibration images, (n, 3, size, size) float32."""
    drawn = pq.read_table(load_artifact(ranges, "ranges").file("images.parquet"))["image"].to_pylist()
    catalog = load_catalog(student.catalog)
    row_of = {image: row for row, image in enumerate(catalog.table["image"].to_pylist())}
    rows = pa.array([row_of[image] for image in drawn])
    images = Catalog(catalog.table.take(rows), catalog.root, catalog.artifact)
    return np.concatenate(list(read_batches(images, preprocess_of(student), 64)))


def run_tool(tool: str, environment: str, graph: Path, pixels: Path, output: Path, target: str = _TARGET) -> None:
    """Quantise a graph with a tool in the tool's environment.

    Raises:
        UserError: The environment does not exist, or the tool fails.
    """
    partial_output = output.with_suffix(".partial.onnx")
    run_in_venv(environment, "quantizers.py", [tool, str(graph), str(pixels), str(partial_output)], target)
    os.replace(partial_output, output)


def measure_graphs(student: TrainedStudent, graphs: dict[str, Path]) -> dict[str, MeasuredGraph]:
    """Score every graph on the test split in both runtimes, and time it; the first graph is the FP32 reference."""
    test, preprocess = load_catalog(student.catalog).select(split="test"), preprocess_of(student)
    times = time_graphs(graphs, preprocess.size)
    measured: dict[str, MeasuredGraph] = {}
    expected: NDArray[np.float32] | None = None
    for name, path in graphs.items():
        vectors = embed(test, preprocess, onnxruntime_forward(path, 1))
        expected = vectors if expected is None else expected
        cosines = parity(expected, vectors)
        measured[name] = MeasuredGraph(
            score_split(test, vectors),
            score_split(test, embed(test, preprocess, openvino_forward(path, 1))),
            cosines["cosine_mean"],
            cosines["cosine_min"],
            times[name, "openvino"],
            times[name, "onnxruntime"],
            path.stat().st_size,
        )
        recall, latency = measured[name].scores.recall_at_1, measured[name].openvino
        log.info(f"  {student.name}, {name}: recall@1 {recall:.4f}, {latency:.2f} ms")
    return measured


def time_graphs(graphs: dict[str, Path], size: int) -> dict[tuple[str, str], float]:
    """Return the p50 in ms of one image and one thread by graph and runtime, from interleaved calls."""
    pixels = np.zeros((1, 3, size, size), np.float32)
    calls = {(name, "openvino"): partial(openvino_forward(path, 1), pixels) for name, path in graphs.items()}
    calls |= {(name, "onnxruntime"): partial(onnxruntime_forward(path, 1), pixels) for name, path in graphs.items()}
    measurements = measure({"\n".join(key): call for key, call in calls.items()}, _SECONDS)
    return {key: summarise(measurements["\n".join(key)])["p50"] for key in calls}


def onnxruntime_forward(path: Path, threads: int) -> Forward:
    """Return the forward function of an ONNX file on ONNX Runtime's CPU provider."""
    runner = GraphSession(onnx.load(path, load_external_data=False), threads)
    return lambda batch: runner.run([OUTPUT], {INPUT: batch})[0]


def preprocess_of(student: TrainedStudent) -> Preprocess:
    """Return the preprocessing of a student's card."""
    preprocess = load_artifact(student.artifact, "student").card.preprocess
    assert preprocess is not None
    return preprocess


def _gain(name: str, graph: MeasuredGraph, other: MeasuredGraph, command: str) -> Figure:
    gain = graph.scores.hits.astype(float) - other.scores.hits
    return Figure(name, float(gain.mean()), "", 0, ">=", command, mean_interval(gain, graph.scores.products, lowest=-1))


def _row(student: str, name: str, graph: MeasuredGraph, fp32: MeasuredGraph) -> dict[str, Any]:
    return {
        "student": student,
        "by": name,
        "recall@1 [95 %]": recall_text(graph.scores),
        "drop, paired [95 %]": drop_text(fp32.scores, graph.scores),
        "mAP": f"{graph.scores.map:.4f}",
        "cosine mean": f"{graph.cosine_mean:.5f}",
        "cosine min": f"{graph.cosine_min:.5f}",
        "recall@1, OpenVINO": f"{graph.openvino_scores.recall_at_1:.4f}",
        "ms, OpenVINO": f"{graph.openvino:.2f}",
        "ms, ONNX Runtime": f"{graph.onnxruntime:.2f}",
    }
