"""Engines on the GPU at hand beside what else runs a student there: milliseconds, recall, and what was fused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.latency.measure import time_models
from benchmarks.report.schema import Timing
from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.figures import Figure, Row
from experiments.int8.tools import TrainedStudent
from experiments.intervals import recall_text
from export.backends.registry import Model, default_threads, models_of
from export.config import EngineConfig, Int8Config, OnnxConfig
from export.int8 import export_int8
from export.tensorrt.bindings import Builder, import_tensorrt
from export.tensorrt.build import build_engine
from export.to_onnx import export_onnx
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.retrieval.embeddings import embed, score_split

log = get_logger(__name__)

BATCHES = (1, 8, 32, 128)
BACKENDS = ("torch-cuda", "torch-compile-cuda", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
GRAPHS = ("fp16", "fp16-opset20", "int8", "int8-full-mha", "fp8")
BUILDERS: tuple[Builder, ...] = ("tensorrt", "tensorrt-rtx")
_SECONDS = 2.0


def export_graphs(student: TrainedStudent) -> dict[str, Path]:
    """The graphs that engines are built from, by the names of :data:`GRAPHS`."""
    folder = student.folder / "gpu"

    def plain(name: str, precision: Literal["fp32", "fp16"], opset: Literal[20, 23] = 23) -> Path:
        return export_onnx(OnnxConfig(str(student.artifact), str(folder / name), precision, opset))

    floats = plain("fp32", "fp32")
    ranges = calibrate(CalibrateConfig(str(floats), str(student.catalog), str(folder / "ranges")))

    def eight(name: str, **options: Any) -> Path:
        return export_int8(Int8Config(str(floats), str(ranges), str(folder / name), **options))

    return {
        "fp16": plain("fp16", "fp16"),
        "fp16-opset20": plain("fp16-opset20", "fp16", 20),
        "int8": eight("int8"),
        "int8-full-mha": eight("int8-full-mha", scope="full-mha"),
        "fp8": eight("fp8", dtype="fp8"),
    }


def build_engines(graphs: dict[str, Path], target: str) -> dict[str, Path]:
    """An engine of every graph by every builder that is installed; what a builder refuses is said and left out."""
    engines = {}
    for backend in BUILDERS:
        for name, graph in graphs.items():
            output = graph.parent / f"{name}-{backend}"
            try:
                import_tensorrt(backend)
                config = EngineConfig(str(graph), str(output), backend, target, max_batch=max(BATCHES))
                engines[output.name] = build_engine(config)
            except UserError as error:
                log.info(f"  {output.name}: not built: {error}")
    return engines


def gpu_engines(
    student: TrainedStudent, target: str, command: str, backends: Sequence[str] = BACKENDS, seconds: float = _SECONDS
) -> tuple[list[Figure], dict[str, list[Row]]]:
    """Time and score a student and everything built from it.

    Args:
        student: trained, and what it is scored on.
        target: architectures that TensorRT-RTX builds for; TensorRT builds for the GPU at hand.
        command: makes the figures again.
        backends: that run here.
        seconds: of timing each model and batch.

    Returns:
        figures of topic ``gpu``, and the table behind them.
    """
    graphs = export_graphs(student)
    engines = build_engines(graphs, target)
    paths = [str(path) for path in (student.artifact, *graphs.values(), *engines.values())]
    times = time_models(paths, BATCHES, seconds, default_threads(), backends, starts=0)
    test = load_catalog(student.catalog).select(split="test")
    figures: list[Figure] = []
    rows: list[Row] = []
    for model in (model for path in paths for model in models_of(path, backends)):
        found, row = _measure(model, times[model.name], test, command)
        figures, rows = figures + found, [*rows, row]
    return figures + _fusion(engines, command), {"engines": rows}


def _measure(model: Model, timed: Timing, test: Catalog, command: str) -> tuple[list[Figure], Row]:
    """Figures and row of one model, from its times and a search of the test split; no figures if it did not run."""
    row: Row = {"model": model.name, "precision": model.precision, "recall@1 [95 %]": ""}
    row |= {**{f"ms, batch {batch} (of the ceiling)": "" for batch in BATCHES}, "notes": timed.notes}
    if timed.latency_ms is None:
        return [], row
    scores = score_split(test, embed(test, model.preprocess, model.open(default_threads())))
    row["recall@1 [95 %]"] = recall_text(scores)
    figures = [Figure(f"{model.name}: recall@1", scores.recall_at_1, "", None, ">=", command, scores.ci95)]
    for batch in BATCHES:
        p50 = timed.latency_ms[str(batch)].p50
        share = "" if timed.of_ceiling is None else f" ({timed.of_ceiling[str(batch)]:.0%})"
        row[f"ms, batch {batch} (of the ceiling)"] = f"{p50:.3f}{share}"
        figures.append(Figure(f"{model.name}, batch {batch}", p50, "ms", None, "<=", command))
    return figures, row


def unmeasured(command: str) -> list[Figure]:
    """The figures of a machine without a GPU: their names, and no values."""
    names = [f"student ({backend})" for backend in BACKENDS[:2]] + ["fp16 (onnxruntime-cuda)"]
    names += [f"{graph}-{backend} ({backend})" for backend in BUILDERS for graph in GRAPHS]
    figures = [Figure(f"{name}, batch {batch}", None, "ms", None, "<=", command) for name in names for batch in BATCHES]
    return figures + _fusion({}, command)


def _fusion(engines: dict[str, Path], command: str) -> list[Figure]:
    """How many attentions TensorRT fused in each form of the graph: one operator, or spelt out."""
    figures = []
    for graph, opset in (("fp16", 23), ("fp16-opset20", 20)):
        path = engines.get(f"{graph}-tensorrt")
        found = load_artifact(path).card.metrics.get("inspector", {}).get("fused_attention") if path else None
        name = f"TensorRT: fused attention layers of the graph of opset {opset}"
        figures.append(Figure(name, None if found is None else float(found), "", None, ">=", command))
    return figures
