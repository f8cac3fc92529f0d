"""Our INT8 of a student beside that of other tools: same FP32 graph, same images, same queries."""

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
from vpr.retrieval.metrics import RetrievalScores, bootstrap_interval

log = get_logger(__name__)

OURS, FLOAT = "ours", "FP32"
BUDGET = 0.005
BUDGETED = f"ours, within {BUDGET:g}"
# The environment that each tool runs in; NNCF's and ModelOpt's requirements clash with ours.
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
_AS_FAST = 1.02  # less than this is noise
_LEAST_COSINE, _LEAST_RETENTION = 0.999, 0.995


@dataclass(frozen=True)
class TrainedStudent:
    """A trained student and what it is scored on.

    Attributes:
        name: of the set.
        artifact: student artifact.
        catalog: artifact with train and test splits.
        folder: of what is made.
    """

    name: str
    artifact: Path
    catalog: Path
    folder: Path


@dataclass(frozen=True)
class Measured:
    """One graph on the test split and on this machine.

    Attributes:
        scores: of its embeddings by ONNX Runtime.
        openvino_scores: of its embeddings by OpenVINO, which computes some graphs otherwise.
        cosine_mean: of ONNX Runtime's embeddings to our FP32 graph's, over images.
        cosine_min: the least of them.
        openvino: milliseconds of one image, p50.
        onnxruntime: the same.
        size: of the file, bytes.
    """

    scores: RetrievalScores
    openvino_scores: RetrievalScores
    cosine_mean: float
    cosine_min: float
    openvino: float
    onnxruntime: float
    size: int


def compare_tools(student: TrainedStudent, command: str) -> tuple[list[Figure], list[Row]]:
    """Quantise a student with every tool and measure all graphs side by side.

    Returns:
        figures of our default against FP32 and against the best of the others, and the table.
    """
    found = measure_graphs(student, quantise_with_all(student))
    ours, floats, budgeted = found[OURS], found[FLOAT], found[BUDGETED]
    others = {name: one for name, one in found.items() if name in ENVIRONMENTS}
    best = max(others, key=lambda name: others[name].scores.recall_at_1)
    fastest = min(others, key=lambda name: others[name].openvino)
    retained = ours.scores.recall_at_1 / floats.scores.recall_at_1
    speed = others[fastest].openvino / budgeted.openvino
    beaten_by = [name for name, one in others.items() if not matched(one, (ours, budgeted))]
    if beaten_by:
        log.info(f"  {student.name}: ahead of ours in recall at their speed: {', '.join(beaten_by)}")
    what = student.name
    figures = [
        Figure(f"{what}: INT8 over FP32, recall@1", retained, "", _LEAST_RETENTION, ">=", command),
        Figure(f"{what}: INT8, mean cosine to FP32", ours.cosine_mean, "", _LEAST_COSINE, ">=", command),
        _ahead(f"{what}: INT8 less the best other tool, recall@1", ours, others[best], command),
        _ahead(f"{what}: {BUDGETED} less the fastest other tool, recall@1", budgeted, others[fastest], command),
        Figure(f"{what}: fastest other tool over {BUDGETED}, OpenVINO ms", speed, "times", 1, ">=", command),
        Figure(f"{what}: tools ahead of ours in recall at their speed", len(beaten_by), "", 0, "<=", command),
    ]
    return figures, [_row(student.name, name, one, floats) for name, one in found.items()]


def matched(other: Measured, ours: Iterable[Measured]) -> bool:
    """Whether one of ours finds as much and is as fast on OpenVINO."""
    return any(
        one.scores.recall_at_1 >= other.scores.recall_at_1 and one.openvino <= _AS_FAST * other.openvino for one in ours
    )


def quantise_with_all(student: TrainedStudent) -> dict[str, Path]:
    """ONNX files by tool; finished ones are used again."""
    found, pixels = own_graphs(student)
    found[BUDGETED] = within_budget(student) / "model.onnx"
    for tool, environment in ENVIRONMENTS.items():
        found[tool] = student.folder / f"{tool}.onnx"
        if not found[tool].is_file():
            log.info(f"  {student.name}: {tool}")
            run_tool(tool, environment, found[FLOAT], pixels, found[tool])
    return found


def own_graphs(student: TrainedStudent) -> tuple[dict[str, Path], Path]:
    """Our FP32 and INT8 graphs of a student, and the file of the images that its ranges are of."""
    folder = student.folder
    folder.mkdir(parents=True, exist_ok=True)
    floats = export_onnx(OnnxConfig(str(student.artifact), str(folder / "fp32")))
    ranges = calibrate(CalibrateConfig(str(floats), str(student.catalog), str(folder / "ranges")))
    ours = export_int8(Int8Config(str(floats), str(ranges), str(folder / "int8"), base="fp32"))
    pixels = folder / "pixels.npy"
    if not pixels.is_file():
        np.save(pixels, calibration_pixels(ranges, student), allow_pickle=False)
    return {FLOAT: floats / "model.onnx", OURS: ours / "model.onnx"}, pixels


def within_budget(student: TrainedStudent) -> Path:
    """The fastest graph found whose recall@1 drops by no more than :data:`BUDGET` on the validation split."""
    floats, ranges = str(student.folder / "fp32"), str(student.folder / "ranges")
    output, catalog = str(student.folder / "int8-budget"), str(student.catalog)
    return export_int8(
        Int8Config(floats, ranges, output, base="fp32", max_recall_drop=BUDGET, catalog=catalog, threads=1)
    )


def calibration_pixels(ranges: Path, student: TrainedStudent) -> NDArray[np.float32]:
    """(n, 3, size, size) float32: the very images that our ranges were measured on."""
    drawn = pq.read_table(load_artifact(ranges, "ranges").file("images.parquet"))["image"].to_pylist()
    catalog = load_catalog(student.catalog)
    places = {image: row for row, image in enumerate(catalog.table["image"].to_pylist())}
    rows = pa.array([places[image] for image in drawn])
    images = Catalog(catalog.table.take(rows), catalog.root, catalog.artifact)
    return np.concatenate(list(read_batches(images, preprocess_of(student), 64)))


def run_tool(tool: str, environment: str, graph: Path, pixels: Path, output: Path, target: str = _TARGET) -> None:
    """Quantise a graph by one tool in its own environment and process.

    Raises:
        UserError: the environment is not there, or the tool fails.
    """
    partial_output = output.with_suffix(".partial.onnx")
    run_in_venv(environment, "quantizers.py", [tool, str(graph), str(pixels), str(partial_output)], target)
    os.replace(partial_output, output)


def measure_graphs(student: TrainedStudent, graphs: dict[str, Path]) -> dict[str, Measured]:
    """Every graph on the test split by both runtimes, and its milliseconds; the first is our FP32 graph."""
    test, preprocess = load_catalog(student.catalog).select(split="test"), preprocess_of(student)
    times = time_graphs(graphs, preprocess.size)
    found: dict[str, Measured] = {}
    expected: NDArray[np.float32] | None = None
    for name, path in graphs.items():
        vectors = embed(test, preprocess, onnxruntime_forward(path, 1))
        expected = vectors if expected is None else expected
        against = parity(expected, vectors)
        found[name] = Measured(
            score_split(test, vectors),
            score_split(test, embed(test, preprocess, openvino_forward(path, 1))),
            against["cosine_mean"],
            against["cosine_min"],
            times[name, "openvino"],
            times[name, "onnxruntime"],
            path.stat().st_size,
        )
        log.info(
            f"  {student.name}, {name}: recall@1 {found[name].scores.recall_at_1:.4f}, {found[name].openvino:.2f} ms"
        )
    return found


def time_graphs(graphs: dict[str, Path], size: int) -> dict[tuple[str, str], float]:
    """p50, in milliseconds, of one image and one thread by graph and runtime, from one interleaved run."""
    pixels = np.zeros((1, 3, size, size), np.float32)
    calls = {(name, "openvino"): partial(openvino_forward(path, 1), pixels) for name, path in graphs.items()}
    calls |= {(name, "onnxruntime"): partial(onnxruntime_forward(path, 1), pixels) for name, path in graphs.items()}
    seen = measure({"\n".join(key): call for key, call in calls.items()}, _SECONDS)
    return {key: summarise(seen["\n".join(key)])["p50"] for key in calls}


def onnxruntime_forward(path: Path, threads: int) -> Forward:
    """An ONNX file on ONNX Runtime's CPU provider."""
    runner = GraphSession(onnx.load(path, load_external_data=False), threads)
    return lambda batch: runner.run([OUTPUT], {INPUT: batch})[0]


def preprocess_of(student: TrainedStudent) -> Preprocess:
    """What a student's card asks for."""
    preprocess = load_artifact(student.artifact, "student").card.preprocess
    assert preprocess is not None
    return preprocess


def _ahead(name: str, ours: Measured, other: Measured, command: str) -> Figure:
    ahead = ours.scores.hits.astype(float) - other.scores.hits
    return Figure(name, float(ahead.mean()), "", 0, ">=", command, bootstrap_interval(ahead))


def _row(student: str, name: str, one: Measured, floats: Measured) -> dict[str, Any]:
    return {
        "student": student,
        "by": name,
        "recall@1 [95 %]": recall_text(one.scores),
        "drop, paired [95 %]": drop_text(floats.scores, one.scores),
        "mAP": f"{one.scores.map:.4f}",
        "cosine mean": f"{one.cosine_mean:.5f}",
        "cosine min": f"{one.cosine_min:.5f}",
        "recall@1, OpenVINO": f"{one.openvino_scores.recall_at_1:.4f}",
        "ms, OpenVINO": f"{one.openvino:.2f}",
        "ms, ONNX Runtime": f"{one.onnxruntime:.2f}",
    }
