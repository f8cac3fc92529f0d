"""All INT8 graphs of trained students on the runtimes that they are offered for, against ONNX's reference evaluator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.figures import Figure, Row
from experiments.venv_runner import run_in_venv
from export.backends.openvino_runtime import openvino_forward
from export.config import Int8Config, OnnxConfig, Recipe
from export.int8 import export_int8
from export.opset import OLDEST_RUNTIME, lower_opset
from export.parity import parity
from export.to_onnx import export_onnx, load_onnx
from export.widen import quantises_fp16, to_fp32
from vpr.data.catalog import load_catalog
from vpr.retrieval.embeddings import read_batches

_GOAL = 0.9999
_BASES = ("fp32", "fp16")
_OPSETS = (20, 23)
_LEVELS = {
    "ONNX Runtime": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "ONNX Runtime without optimisations": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
Pixels = NDArray[np.float32]


def compare_runtimes(
    students: dict[str, tuple[Path, Path]],
    folder: Path,
    count: int,
    command: str,
    calibration: int = 256,
    oldest: str = "",
) -> tuple[list[Figure], list[Row]]:
    """Export each student by every opset, recipe and base; compare the embeddings of images on every runtime.

    Args:
        students: Student and catalogue artifacts by title. Training images calibrate, test images are compared.
        folder: Folder of the graphs.
        count: Number of images to compare; the reference evaluator is slow.
        command: Command of the figures.
        calibration: Number of images that calibrate.
        oldest: Virtual environment with the oldest ONNX Runtime of the hand-off, which gets graphs of its opset; empty
            for none.

    Returns:
        The lowest cosine of a student over its graphs and images for each runtime, and a row for each graph.
    """
    figures: list[Figure] = []
    rows: list[Row] = []
    for title, (student, catalog) in students.items():
        lowest: dict[str, float] = {}
        for opset in _OPSETS:
            fp32 = str(export_onnx(OnnxConfig(str(student), str(folder / f"{title}-{opset}"), opset=opset, images=1)))  # type: ignore[arg-type]
            ranges = str(calibrate(CalibrateConfig(fp32, str(catalog), f"{fp32}-ranges", calibration)))
            for recipe in get_args(Recipe):
                for base in _BASES:
                    output = f"{fp32}-{recipe}-{base}"
                    export_int8(Int8Config(fp32, ranges, output, base=base, scope=recipe))  # type: ignore[arg-type]
                    graph, artifact = load_onnx(output)
                    assert artifact.card.preprocess is not None
                    images = load_catalog(str(catalog)).select(split="test")
                    (pixels,) = read_batches(images.take(np.arange(count)), artifact.card.preprocess, count)
                    cosines = compare_graph(graph, np.asarray(pixels, dtype=np.float32), oldest, folder)
                    lowest = {name: min(lowest.get(name, 1.0), cosine) for name, cosine in cosines.items()}
                    row = {"student": title, "opset": opset, "scope": recipe, "base": base}
                    rows.append(row | {name: f"{cosine:.6f}" for name, cosine in cosines.items()})
        for name, cosine in lowest.items():
            text = f"{title}, all INT8 graphs on {name}: lowest cosine with the reference evaluator"
            figures.append(Figure(text, cosine, "", _GOAL, ">=", command))
    return figures, rows


def compare_graph(graph: ModelProto, pixels: Pixels, oldest: str, folder: Path) -> dict[str, float]:
    """Return the lowest cosine of an image's embedding with that of the reference evaluator, by runtime.

    ``oldest`` is the environment of the oldest runtime, or empty; its graphs are written to ``folder``.
    """
    evaluator = ReferenceEvaluator(graph)
    vectors = []
    for image in pixels:  # one at a time, since the evaluator keeps all activations
        (vector,) = evaluator.run(None, {"pixels": image[None]})
        vectors.append(vector)
    expected = np.concatenate(vectors)
    runtimes: dict[str, Callable[[Pixels], NDArray[np.float32]]] = {"OpenVINO": openvino_forward(graph)}
    for name, level in _LEVELS.items():
        runtimes[name] = _session(graph, level)
    if oldest:
        runtimes[f"ONNX Runtime {OLDEST_RUNTIME}"] = partial(_run_in_oldest, graph, oldest, folder)
    return {name: parity(expected, run(pixels))["cosine_min"] for name, run in runtimes.items()}


def _run_in_oldest(graph: ModelProto, environment: str, folder: Path, pixels: Pixels) -> NDArray[np.float32]:
    """Return the embeddings of a graph, as the hand-off for CPUs writes it, in the oldest runtime."""
    lowered = lower_opset(graph)
    onnx.save(to_fp32(lowered) if quantises_fp16(lowered) else lowered, folder / "oldest.onnx")
    np.save(folder / "pixels.npy", pixels)
    run_in_venv(environment, "run_graphs.py", [str(folder), "oldest.onnx"], "oldest-runtime")
    return np.asarray(np.load(folder / "oldest.npy", allow_pickle=False), dtype=np.float32)


def _session(graph: ModelProto, level: ort.GraphOptimizationLevel) -> Callable[[Pixels], NDArray[np.float32]]:
    """Load a graph in ONNX Runtime as a server does, with no other setting."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]  # type: ignore[return-value]
