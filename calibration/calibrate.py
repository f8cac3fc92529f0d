"""``vpr calibrate``: run training images through the FP32 graph and record what INT8 needs to know."""

from __future__ import annotations

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
from vpr.artifacts.store import (
    config_to_json,
    find_up_to_date,
    load_artifact,
    reraise_as_artifact_error,
    write_artifact,
)
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.imaging.preprocess import Preprocess
from vpr.inference.onnx_graph import GraphSession, load_graph
from vpr.retrieval.embeddings import read_batches

log = get_logger(__name__)

_BATCH = 16
_EXACT = 1e-5


@dataclass(frozen=True)
class Range:
    """How a tensor that linears, convolutions or attention read is quantised.

    Attributes:
        threshold: magnitude that maps to 127.
        method: that chose it.
        thresholds: of every method.
        largest: magnitude seen.
        linears: modules of linears that read the tensor; none where a convolution or attention does.
    """

    threshold: float
    method: str
    thresholds: dict[Method, float]
    largest: float
    linears: list[str]


def calibrate(config: CalibrateConfig) -> Path:
    """Measure the inputs of every linear, convolution and attention and write an artifact of kind ``ranges``."""
    model, catalog = load_artifact(config.onnx, "onnx"), load_catalog(config.catalog)
    if model.card.config.get("precision") != "fp32" or model.card.preprocess is None:
        raise UserError(f"{config.onnx}: ranges are measured on the FP32 graph: export it with --precision fp32")
    # The student too: its finishing asks whether the ranges are its own.
    parents = [model.as_parent("onnx"), *model.parents("student")]
    parents += catalog.as_parents()
    evaluation = load_catalog(config.evaluation) if config.evaluation else None
    parents += [] if evaluation is None else evaluation.as_parents("evaluation")
    if find_up_to_date(config.output, "ranges", config_to_json(config), parents):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    graph, preprocess = load_graph(model), model.card.preprocess
    images = _select(config, graph, preprocess, catalog, evaluation)

    def seen_in(one: onnx.ModelProto) -> dict[str, Activations]:
        return measure_activations(one, read_batches(images, preprocess, _BATCH), config.seed)

    smoothings: list[Smoothing] = []
    with reraise_as_artifact_error(model):
        seen = seen_in(graph)
    if config.smooth:
        smoothings = search_smoothing(graph, seen)
        smoothed = smooth(graph, smoothing_by_module(smoothings))
        check_unchanged(graph, smoothed, next(read_batches(images, preprocess, _BATCH)))
        graph, seen = smoothed, seen_in(smoothed)
    linears = find_linears(graph)
    ranges = {name: choose_range(name, one, linears, config) for name, one in seen.items()}
    arrays = {f"smooth:{linear}": values for linear, values in smoothing_by_module(smoothings).items()}
    if config.correct:
        arrays |= _corrections(linears, seen, ranges)
    with write_artifact(config.output, "ranges", config_to_json(config), parents) as draft:
        written = {name: vars(one) for name, one in ranges.items()}
        (draft.path / "ranges.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
        pq.write_table(images.table.select(["image", "product", "sha256"]), draft.path / "images.parquet")
        save_file(arrays, draft.path / "adjustments.safetensors")
        draft.catalog = catalog.summary()
        draft.metrics = {
            "images": len(images),
            "tensors": len(ranges),
            "smoothing": [_described(one) for one in smoothings],
            "methods": {method: sum(one.method == method for one in ranges.values()) for method in METHODS},
        }
    log.info(f"{config.output}: ranges of {len(ranges)} tensors from {len(images)} training images, by {config.method}")
    return Path(config.output)


def choose_range(name: str, seen: Activations, linears: list[Linear], config: CalibrateConfig) -> Range:
    """The range of one tensor by the configuration's method."""
    found = {method: threshold(seen.histogram, method, config.percentile) for method in METHODS}
    readers = [linear for linear in linears if linear.input == name]
    if config.method == "auto" and readers:
        errors = {
            method: sum(output_error(seen.rows, linear.weight, limit) for linear in readers)
            for method, limit in found.items()
        }
        method: Method = min(METHODS, key=lambda one: errors[one])
    else:
        method = "mse" if config.method == "auto" else config.method
    return Range(found[method], method, found, seen.histogram.largest, [linear.module for linear in readers])


def check_unchanged(graph: onnx.ModelProto, smoothed: onnx.ModelProto, batch: NDArray[np.float32]) -> None:
    """Refuse a fold that changes the float graph's embeddings by more than 1e-5."""
    before, after = (GraphSession(one).embed(batch) for one in (graph, smoothed))
    largest = float(np.abs(before - after).max())
    if not largest <= _EXACT:
        raise UserError(
            f"smooth: folding changes the embeddings by {largest:.1e} (limit {_EXACT}): calibrate with --smooth false"
        )


def _select(
    config: CalibrateConfig,
    graph: onnx.ModelProto,
    preprocess: Preprocess,
    catalog: Catalog,
    evaluation: Catalog | None,
) -> Catalog:
    """The training images that ranges are measured on, none of which is scored."""
    training = catalog.select(split="train")
    scored = catalog if evaluation is None else evaluation
    scored = scored.where(scored.table["split"].to_numpy() != "train")

    def embed(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        session = GraphSession(graph)
        batches = read_batches(training.take(rows), preprocess, _BATCH)
        return np.concatenate([session.embed(batch) for batch in batches])

    return training.take(select_images(training, config.count, config.seed, config.selection, embed, scored))


def _corrections(
    linears: list[Linear], seen: dict[str, Activations], ranges: dict[str, Range]
) -> dict[str, NDArray[np.float32]]:
    return {
        f"bias:{linear.module}": correct_bias(seen[linear.input].rows, linear.weight, ranges[linear.input].threshold)
        for linear in linears
        if linear.bias is not None
    }


def _described(one: Smoothing) -> dict[str, Any]:
    return {"linear": one.linear, "source": one.source, "alpha": one.alpha, "error": round(one.gain, 4)}
