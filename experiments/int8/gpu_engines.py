"""Engines and other runtimes of a student on this machine's GPU: latency, recall, fused layers."""

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
from export.backends.base import BackendUnavailable, RunFailed
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
_DTYPES = ("", "-tf32", "-bf16", "-fp16")
_TORCH = (*(f"torch-cuda{dtype}" for dtype in _DTYPES), *(f"torch-compile-cuda{dtype}" for dtype in _DTYPES))
BACKENDS = (*_TORCH, "onnxruntime-cuda", "onnxruntime-tensorrt-rtx", "tensorrt", "tensorrt-rtx")
GRAPHS = ("fp16", "fp16-opset20", "int8", "int8-full-mha", "fp8")
BUILDERS: tuple[Builder, ...] = ("tensorrt", "tensorrt-rtx")
_SECONDS = 2.0


def export_variants(student: TrainedStudent) -> dict[str, Path]:
    """Return the graphs that engines are built from, by the names of :data:`GRAPHS`."""
    folder = student.folder / "gpu"

    def export_float(name: str, precision: Literal["fp32", "fp16"], opset: Literal[20, 23] = 23) -> Path:
        return export_onnx(OnnxConfig(str(student.artifact), str(folder / name), precision, opset))

    fp32 = export_float("fp32", "fp32")
    ranges = calibrate(CalibrateConfig(str(fp32), str(student.catalog), str(folder / "ranges")))

    def quantise(name: str, **options: Any) -> Path:
        return export_int8(Int8Config(str(fp32), str(ranges), str(folder / name), **options))

    return {
        "fp16": export_float("fp16", "fp16"),
        "fp16-opset20": export_float("fp16-opset20", "fp16", 20),
        "int8": quantise("int8"),
        "int8-full-mha": quantise("int8-full-mha", scope="full-mha"),
        "fp8": quantise("fp8", dtype="fp8"),
    }


def build_engines(graphs: dict[str, Path], target: str) -> dict[str, Path]:
    """Build an engine of every graph with every installed builder; log and skip graphs that a builder rejects."""
    engines = {}
    for backend in BUILDERS:
        for name, graph in graphs.items():
            output = graph.parent / f"{name}-{backend}"
            try:
                import_tensorrt(backend)
                config = EngineConfig(str(graph), str(output), backend, target, max_batch=max(BATCHES), batches=BATCHES)
                engines[output.name] = build_engine(config)
            except UserError as error:
                log.info(f"  {output.name}: not built: {error}")
    return engines


def gpu_engines(
    student: TrainedStudent, target: str, command: str, backends: Sequence[str] = BACKENDS, seconds: float = _SECONDS
) -> tuple[list[Figure], dict[str, list[Row]]]:
    """Time and score a student, its graphs and engines.

    Args:
        student: Trained student and its data.
        target: Architecture for TensorRT-RTX; TensorRT builds for this machine's GPU.
        command: Command that repeats the measurement.
        backends: Backends to run.
        seconds: Time of each model and batch size.

    Returns:
        Figures of topic ``gpu``, and their table.
    """
    graphs = export_variants(student)
    engines = build_engines(graphs, target)
    paths = [str(path) for path in (student.artifact, *graphs.values(), *engines.values())]
    times = time_models(paths, BATCHES, seconds, default_threads(), backends, starts=0)
    test = load_catalog(student.catalog).select(split="test")
    figures: list[Figure] = []
    rows: list[Row] = []
    for model in (model for path in paths for model in models_of(path, backends)):
        model_figures, row = _measure(model, times[model.name], test, command)
        figures, rows = figures + model_figures, [*rows, row]
    return figures + _fusion(engines, command), {"engines": rows}


def _measure(model: Model, timed: Timing, test: Catalog, command: str) -> tuple[list[Figure], Row]:
    """Return figures and row of a model, from its latencies and test recall; no figures if it did not run."""
    row: Row = {"model": model.name, "precision": model.precision, "recall@1 [95 %]": ""}
    row |= {**{f"ms, batch {batch} (of the roofline)": "" for batch in BATCHES}, "notes": timed.notes}
    if timed.latency_ms is None:
        return [], row
    try:
        scores = score_split(test, embed(test, model.preprocess, model.open(default_threads())))
    except (BackendUnavailable, RunFailed) as reason:
        row["notes"] = "; ".join(filter(None, (timed.notes, f"no recall: {reason}")))
        return [], row
    row["recall@1 [95 %]"] = recall_text(scores)
    figures = [Figure(f"{model.name}: recall@1", scores.recall_at_1, "", None, ">=", command, scores.ci95)]
    for batch in BATCHES:
        latency = timed.latency_ms.get(str(batch))
        if latency is None:  # the notes have the reason
            continue
        p50 = latency.p50
        share = "" if timed.of_ceiling is None else f" ({timed.of_ceiling[str(batch)]:.0%})"
        row[f"ms, batch {batch} (of the roofline)"] = f"{p50:.3f}{share}"
        figures.append(Figure(f"{model.name}, batch {batch}", p50, "ms", None, "<=", command))
    return figures, row


def unmeasured(command: str) -> list[Figure]:
    """Return the figures of a machine without a GPU: names without values."""
    names = [f"student ({backend})" for backend in _TORCH] + ["fp16 (onnxruntime-cuda)"]
    names += [f"{graph}-{backend} ({backend})" for backend in BUILDERS for graph in GRAPHS]
    figures = [Figure(f"{name}, batch {batch}", None, "ms", None, "<=", command) for name in names for batch in BATCHES]
    return figures + _fusion({}, command)


def _fusion(engines: dict[str, Path], command: str) -> list[Figure]:
    """Return the numbers of attentions that TensorRT fused: as one operator (opset 23), or as primitives (opset 20)."""
    figures = []
    for graph, opset in (("fp16", 23), ("fp16-opset20", 20)):
        path = engines.get(f"{graph}-tensorrt")
        fused = load_artifact(path).card.metrics.get("inspector", {}).get("fused_attention") if path else None
        name = f"TensorRT: fused attention layers of the graph of opset {opset}"
        figures.append(Figure(name, None if fused is None else float(fused), "", None, ">=", command))
    return figures
