"""``vpr calibrate``: run training images through the FP32 graph and write ranges for INT8."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save_file

from calibration.activation_stats import Activations, measure_activations
from calibration.config import CalibrateConfig, Method
from calibration.onnx_layers import Linear, find_linears
from calibration.ranges import METHODS, threshold
from calibration.sampling import select_images
from calibration.smoothquant import Smoothing, correct_bias, output_error, search_smoothing, smooth, smoothing_by_module
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import load_artifact, reraise_as_artifact_error
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.seen import record_seen
from vpr.imaging.preprocess import Preprocess
from vpr.inference.onnx_graph import GraphSession, load_graph
from vpr.retrieval.embeddings import read_batches

log = get_logger(__name__)

_BATCH = 16
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Range:
    """Range of a tensor that linears, convolutions or attention read."""

    threshold: float  # magnitude that maps to 127
    method: str  # method that chose the threshold
    thresholds: dict[Method, float]  # threshold of every method
    largest: float  # largest magnitude seen
    linears: list[str]  # modules of the linears that read the tensor; empty if only a convolution or attention reads it


def calibrate(config: CalibrateConfig) -> Path:
    """Measure the inputs of every linear, convolution and attention and write an artifact of kind ``ranges``."""
    model, catalog = load_artifact(config.onnx, "onnx"), load_catalog(config.catalog)
    evaluation = load_catalog(config.evaluation) if config.evaluation else None
    if model.card.config.get("precision") != "fp32" or model.card.preprocess is None:
        raise UserError(f"{config.onnx}: expected an FP32 graph to measure ranges on. Export with --precision fp32.")
    # The network is a parent too, because QAT checks that the ranges belong to its student.
    parents = [model.as_parent("onnx"), *model.networks(), *catalog.as_parents()]
    parents += [] if evaluation is None else evaluation.as_parents("evaluation")
    stage = Stage(config.output, "ranges", config_to_json(config), parents)
    if stage.find():
        return stage.path
    graph, preprocess = load_graph(model), model.card.preprocess
    images = _select(config, graph, preprocess, catalog, evaluation)

    def measure(measured: onnx.ModelProto) -> dict[str, Activations]:
        return measure_activations(measured, read_batches(images, preprocess, _BATCH), config.seed)

    smoothings: list[Smoothing] = []
    with reraise_as_artifact_error(model):
        activations = measure(graph)
    if config.smooth:
        smoothings = search_smoothing(graph, activations)
        smoothed = smooth(graph, smoothing_by_module(smoothings))
        check_unchanged(graph, smoothed, next(read_batches(images, preprocess, _BATCH)))
        graph, activations = smoothed, measure(smoothed)
    linears = find_linears(graph)
    ranges = {name: choose_range(name, tensor, linears, config) for name, tensor in activations.items()}
    adjustments = {f"smooth:{module}": factors for module, factors in smoothing_by_module(smoothings).items()}
    for linear in linears if config.correct else ():
        if linear.bias is not None:
            rows, limit = activations[linear.input].rows, ranges[linear.input].threshold
            adjustments[f"bias:{linear.module}"] = correct_bias(rows, linear.weight, limit)
    with stage.write() as draft:
        entries = {name: vars(range_) for name, range_ in ranges.items()}
        (draft.path / "ranges.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
        pq.write_table(images.table.select(["image", "product", "sha256"]), draft.path / "images.parquet")
        save_file(adjustments, draft.path / "adjustments.safetensors")
        record_seen(draft.path, [model], {"calibration": images})
        draft.catalog = catalog.summary()
        draft.metrics = {
            "images": len(images),
            "tensors": len(ranges),
            "smoothing": [_smoothing_entry(smoothing) for smoothing in smoothings],
            "methods": {method: sum(range_.method == method for range_ in ranges.values()) for method in METHODS},
        }
    log.info(f"{config.output}: ranges of {len(ranges)} tensors from {len(images)} images, method {config.method}")
    return stage.path


def choose_range(name: str, activations: Activations, linears: list[Linear], config: CalibrateConfig) -> Range:
    """Choose the range of one tensor by the configured method."""
    thresholds = {method: threshold(activations.histogram, method, config.percentile) for method in METHODS}
    readers = [linear for linear in linears if linear.input == name]
    if config.method == "auto" and readers:
        rows, weights = activations.rows, [linear.weight for linear in readers]
        errors = {name: sum(output_error(rows, weight, thresholds[name]) for weight in weights) for name in METHODS}
        method: Method = min(METHODS, key=lambda candidate: errors[candidate])
    else:
        method = "mse" if config.method == "auto" else config.method
    modules = [linear.module for linear in readers]
    return Range(thresholds[method], method, thresholds, activations.histogram.largest, modules)


def check_unchanged(graph: onnx.ModelProto, smoothed: onnx.ModelProto, batch: NDArray[np.float32]) -> None:
    """Raise :class:`UserError` if smoothing changes the float graph's embeddings by more than 1e-5."""
    before, after = (GraphSession(version).embed(batch) for version in (graph, smoothed))
    difference = float(np.abs(before - after).max())
    if not difference <= _TOLERANCE:
        raise UserError(f"smooth: it changes the embeddings by {difference:.1e} (limit {_TOLERANCE}). Remove --smooth.")


def _select(
    config: CalibrateConfig, graph: onnx.ModelProto, preprocess: Preprocess, catalog: Catalog, scored: Catalog | None
) -> Catalog:
    """Return the calibration images: training images, none of them scored."""
    training = catalog.select(split="train")
    scored = catalog if scored is None else scored
    scored = scored.where(scored.table["split"].to_numpy() != "train")

    def embed(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        session = GraphSession(graph)
        batches = read_batches(training.take(rows), preprocess, _BATCH)
        return np.concatenate([session.embed(batch) for batch in batches])

    return training.take(select_images(training, config.count, config.seed, config.selection, embed, scored))


def _smoothing_entry(smoothing: Smoothing) -> dict[str, Any]:
    error = round(smoothing.error_ratio, 4)
    return {"linear": smoothing.linear, "source": smoothing.source, "alpha": smoothing.alpha, "error": error}
