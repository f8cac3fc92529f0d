"""``vpr export int8``: quantise an FP32 graph by its ranges, within a recall budget if one is given."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.onnx_layers import linear_nodes, weighted_nodes
from calibration.smoothquant import smooth
from export.bias import needs_separate_bias
from export.candidates import CandidateRunner, resolve_timing_backend
from export.config import Int8Config, QuantDtype, Recipe
from export.fp16 import to_fp16
from export.golden import write_graph_golden
from export.mixed_precision import Budget, search_mixed_precision
from export.qdq import quantise, quantised_nodes
from export.to_onnx import count_operators, fill_graph_card, load_onnx
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import UserError, check_prefixes
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.seen import Use, combine, count_seen, hash_catalog, read_seen, record_seen
from vpr.inference.int8 import read_ranges
from vpr.inference.onnx_file import save_graph
from vpr.retrieval.embeddings import read_batches

log = get_logger(__name__)

_BATCH = 16


@dataclass(frozen=True)
class Calibrated:
    """A float graph after calibration, and the values that quantise it."""

    graph: onnx.ModelProto  # FP32 graph, smoothed if the ranges contain smoothing factors
    thresholds: dict[str, float]  # magnitude that maps to the largest quantised value, by tensor
    corrections: dict[str, NDArray[np.float32]]  # (out,) float32 to subtract from the bias of a linear, by module

    def quantise(self, layers: Collection[str], dtype: QuantDtype) -> onnx.ModelProto:
        """Return the FP32 graph with these layers quantised; the graph itself if there are none."""
        return quantise(self.graph, self.thresholds, layers, dtype, self.corrections) if layers else self.graph


def export_int8(config: Int8Config) -> Path:
    """Insert Q/DQ and write an artifact; with ``max_recall_drop``, ``decision.json`` gives each layer's reason.

    :class:`UserError` if the ranges are of another graph, a layer has no range, or no layer is left to quantise.
    """
    graph, model = load_onnx(config.onnx)
    ranges = load_artifact(config.ranges, "ranges")
    qat_excluded = _check_parents(config, model, ranges)
    validation = load_catalog(config.catalog).select(split="validation") if config.catalog else None
    parents = [model.as_parent("onnx"), ranges.as_parent("ranges"), *model.networks()]
    parents += [] if validation is None else validation.as_parents()
    values = {**config_to_json(config), "precision": config.dtype}
    recipe: Recipe = config.scope or ("linear" if validation is None else "full")
    if config.base == "fp16" and needs_separate_bias(graph, quantised_nodes(graph, (), recipe)):
        values["bias"] = "separate"  # graphs of earlier versions are wrong on ONNX Runtime
    stage = Stage(config.output, "onnx", values, parents)
    if stage.find():
        return stage.path

    calibrated = read_calibrated(graph, model, ranges)
    excluded = qat_excluded if config.exclude_layers is None else config.exclude_layers
    if qat_excluded is None:
        check_prefixes("exclude_layers", excluded or (), list(quantised_nodes(calibrated.graph, (), "full")))
    layers = list(quantised_nodes(calibrated.graph, excluded, recipe))
    if not layers:
        raise UserError(f"exclude_layers: {', '.join(excluded or ())} leaves no layer to quantise. Exclude fewer.")
    decision = None
    if validation is not None:
        seen = _count_seen(config, [model, ranges], validation)
        decision = {**_search_layers(config, model, calibrated, layers, validation), "seen": seen}
        layers = decision["quantised"]
    fp32_nodes = model.names("fp32_nodes")
    quantised = calibrated.quantise(layers, config.dtype)
    if config.base == "fp16":
        quantised = to_fp16(quantised, fp32_nodes)

    unquantised = [name for name in quantised_nodes(calibrated.graph, (), recipe) if name not in layers]
    is_mixed = not set(quantised_nodes(calibrated.graph, qat_excluded)) <= set(layers)
    with stage.write() as draft:
        save_graph(quantised, draft.path)
        fill_graph_card(draft, model, quantised)
        write_graph_golden(draft, quantised)
        uses: dict[Use, Catalog] = {} if validation is None else {"selection": validation}
        record_seen(draft.path, [model, ranges], uses)
        draft.metrics = {
            "precision": f"{config.dtype}-mixed" if is_mixed else config.dtype,
            "quantised": layers,
            "unquantised": unquantised,
            "fp32_nodes": list(fp32_nodes),
            "nodes": count_operators(quantised),
        }
        if decision is not None:
            (draft.path / "decision.json").write_text(json.dumps(decision, indent=1), encoding="utf-8")
            keys = ("max_recall_drop", "confidence", "confirmed", "drop_upper_bound", "outcome", "latency_ms")
            draft.metrics |= {key: decision[key] for key in keys}
    precision = f"{config.dtype.upper()} over {config.base.upper()}"
    log.info(f"{config.output}: {precision}, {len(layers)} layers quantised, {len(unquantised)} not")
    return stage.path


def read_calibrated(graph: onnx.ModelProto, model: Artifact, ranges: Artifact) -> Calibrated:
    """Apply the ranges' smoothing to an FP32 graph.

    A student fine-tuned with QAT under these ranges has adapted its weights, so only the thresholds apply to it.
    """
    measured = read_ranges(ranges)
    if _is_qat_of(model, ranges):
        return Calibrated(graph, measured.thresholds, {})
    return Calibrated(smooth(graph, measured.smoothing), measured.thresholds, measured.corrections)


def _check_parents(config: Int8Config, model: Artifact, ranges: Artifact) -> tuple[str, ...] | None:
    """Check that graph and ranges belong together; return the layers that QAT excluded, None without QAT."""
    if model.card.config.get("precision") != "fp32":
        raise UserError(f"{config.onnx}: expected an FP32 graph. Export with --precision fp32; --base sets the rest.")
    if not _is_qat_of(model, ranges):
        if model.as_parent("onnx") not in ranges.card.parents:
            raise UserError(f"{config.ranges}: the ranges are of another graph. Run `vpr calibrate` on {config.onnx}.")
        return None
    excluded = model.names("quantise_exclude_layers")
    if config.exclude_layers not in (None, excluded):
        raise UserError(f"exclude_layers: QAT excluded [{', '.join(excluded)}]. Name the same layers, or none.")
    return excluded


def _is_qat_of(model: Artifact, ranges: Artifact) -> bool:
    """Return whether the student of a graph was fine-tuned with QAT under these ranges."""
    return ranges.as_parent("ranges") in model.card.parents


def _count_seen(config: Int8Config, models: list[Artifact], validation: Catalog) -> dict[str, Any]:
    """Return how many products of the budget the models have seen, for ``decision.json``; warn if they learned any."""
    counts = count_seen(combine(map(read_seen, models)), hash_catalog(validation))
    if counts.learned:
        log.warning(f"{config.catalog}: {counts.learned}. The drop on products that are new may be larger.")
    if counts.unrecorded:
        log.info(f"{config.catalog}: {counts.unrecorded}")
    return asdict(counts)


def _search_layers(
    config: Int8Config, model: Artifact, calibrated: Calibrated, layers: list[str], validation: Catalog
) -> dict[str, Any]:
    """Return the record of the search for layers that stay within the budget, and of its confirmation."""
    assert config.max_recall_drop is not None
    if model.card.preprocess is None or not len(validation):
        raise UserError(f"{config.catalog}: the validation split is empty. Rebuild it with --validation above 0.")
    backend = resolve_timing_backend(config.timing_backend)
    candidates = CandidateRunner(model, backend, config.batch, config.threads, model.names("fp32_nodes"))
    return search_mixed_precision(
        calibrated.graph,
        partial(calibrated.quantise, dtype=config.dtype),
        layers,
        [[node.name for node in nodes_of(calibrated.graph)] for nodes_of in (weighted_nodes, linear_nodes)],
        validation,
        np.concatenate(list(read_batches(validation, model.card.preprocess, _BATCH))),
        Budget(config.max_recall_drop, config.confidence, config.seconds, candidates),
    )
