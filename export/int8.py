"""``vpr export int8``: FP32 graph and ranges -> an INT8 or FP8 graph, within a budget of recall if one is given."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.onnx_layers import linear_nodes, weighted_nodes
from calibration.smoothquant import smooth
from export.candidates import CandidateRunner, resolve_timing_backend
from export.config import Format, Int8Config, Recipe
from export.fp16 import to_fp16
from export.mixed_precision import Budget, search_mixed_precision
from export.qdq import quantise, quantised_nodes
from export.to_onnx import count_operators, fill_graph_card, load_onnx
from vpr.artifacts.store import Artifact, config_to_json, find_up_to_date, load_artifact, write_artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.inference.int8 import read_ranges
from vpr.retrieval.embeddings import read_batches

log = get_logger(__name__)

_READ_BY = 16


@dataclass(frozen=True)
class Calibrated:
    """A float graph as calibration left it, and what quantises it.

    Attributes:
        graph: FP32, smoothed where the ranges say so.
        thresholds: by tensor.
        corrections: of biases, by the module of a linear.
    """

    graph: onnx.ModelProto
    thresholds: dict[str, float]
    corrections: dict[str, NDArray[np.float32]]

    def quantise(self, layers: Collection[str], number: Format) -> onnx.ModelProto:
        """The FP32 graph with these layers quantised; itself with none."""
        return quantise(self.graph, self.thresholds, layers, number, self.corrections) if layers else self.graph


def export_int8(config: Int8Config) -> Path:
    """Insert Q/DQ and write an artifact of kind ``onnx``.

    With ``max_recall_drop`` the artifact also holds ``decision.json``: why every layer is what it is.

    Raises:
        UserError: ranges of another graph, a layer without a range, or nothing left to quantise.
    """
    graph, model = load_onnx(config.onnx)
    ranges = load_artifact(config.ranges, "ranges")
    _check_parents(config, model, ranges)
    parents = [model.as_parent("onnx"), ranges.as_parent("ranges"), *model.parents("student")]
    validation = load_catalog(config.catalog).select(split="validation") if config.catalog else None
    parents += [] if validation is None else validation.as_parents()
    values = {**config_to_json(config), "precision": config.number}
    if find_up_to_date(config.output, "onnx", values, parents):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    calibrated = read_calibrated(graph, model, ranges)
    finished = _finished_keep(model, ranges)
    recipe: Recipe = config.scope or ("linear" if validation is None else "full")
    layers = _allowed(calibrated.graph, finished if config.keep is None else config.keep, recipe)
    wide = model.names("fp32_nodes")
    decision = None if validation is None else _decide(config, model, calibrated, layers, validation, wide)
    if decision is not None:
        layers = decision["quantised"]
    quantised = calibrated.quantise(layers, config.number)
    if config.base == "fp16":
        quantised = to_fp16(quantised, wide)
    left = [name for name in quantised_nodes(calibrated.graph, (), recipe) if name not in layers]
    usual = quantised_nodes(calibrated.graph, finished)
    with write_artifact(config.output, "onnx", values, parents) as draft:
        onnx.save(quantised, draft.path / "model.onnx")
        fill_graph_card(draft, model, quantised)
        draft.metrics = {
            "precision": config.number if set(usual) <= set(layers) else f"{config.number}-mixed",
            "quantised": layers,
            "kept": left,
            "fp32_nodes": list(wide),
            "nodes": count_operators(quantised),
        }
        if decision is not None:
            (draft.path / "decision.json").write_text(json.dumps(decision, indent=1), encoding="utf-8")
            draft.metrics |= {key: decision[key] for key in ("met", "drop", "drop_interval", "latency_ms")}
    kind = f"{config.number.upper()} over {config.base.upper()}"
    log.info(f"{config.output}: {kind}, {len(layers)} layers quantised, {len(left)} kept")
    return Path(config.output)


def _allowed(graph: onnx.ModelProto, keep: tuple[str, ...] | None, recipe: Recipe) -> list[str]:
    """The layers that may be quantised; :class:`UserError` where there is none."""
    layers = list(quantised_nodes(graph, keep, recipe))
    if not layers:
        raise UserError(f"keep: {', '.join(keep or ())} leaves nothing to quantise: name fewer layers")
    return layers


def _decide(
    config: Int8Config,
    model: Artifact,
    calibrated: Calibrated,
    layers: list[str],
    validation: Catalog,
    wide: tuple[str, ...],
) -> dict[str, Any]:
    """Which of the layers are worth their recall on the validation split; ``wide`` nodes stay FP32 in an engine."""
    assert config.max_recall_drop is not None
    if model.card.preprocess is None or not len(validation):
        raise UserError(f"{config.catalog}: its validation split is empty: build it with --validation above 0")
    candidates = CandidateRunner(
        model, resolve_timing_backend(config.timing_backend), config.batch, config.threads, wide
    )
    return search_mixed_precision(
        calibrated.graph,
        partial(calibrated.quantise, number=config.number),
        layers,
        [[node.name for node in some(calibrated.graph)] for some in (weighted_nodes, linear_nodes)],
        validation,
        list(read_batches(validation, model.card.preprocess, _READ_BY)),
        Budget(config.max_recall_drop, config.seconds, candidates),
    )


def read_calibrated(graph: onnx.ModelProto, model: Artifact, ranges: Artifact) -> Calibrated:
    """An FP32 graph with what its ranges say of it.

    A student that was fine-tuned under the ranges has learned its own weights for them: of those only the
    thresholds are taken.
    """
    measured = read_ranges(ranges)
    if ranges.as_parent("ranges") in model.card.parents:
        return Calibrated(graph, measured.thresholds, {})
    return Calibrated(smooth(graph, measured.smoothing), measured.thresholds, measured.corrections)


def _check_parents(config: Int8Config, model: Artifact, ranges: Artifact) -> None:
    if model.card.config.get("precision") != "fp32":
        raise UserError(f"{config.onnx}: Q/DQ is inserted into the FP32 graph: give that one, --base sets the rest")
    # A student that was fine-tuned under these very ranges keeps them.
    if model.as_parent("onnx") not in ranges.card.parents and ranges.as_parent("ranges") not in model.card.parents:
        raise UserError(
            f"{config.ranges}: measured on another graph than {config.onnx}: run 'vpr calibrate' on this one"
        )
    finished = _finished_keep(model, ranges)
    if finished is not None and config.keep not in (None, finished):
        raise UserError(f"keep: the student was finished with [{', '.join(finished)}] kept: give the same or none")


def _finished_keep(model: Artifact, ranges: Artifact) -> tuple[str, ...] | None:
    """What the finishing of a student under these ranges left alone; None where there was none."""
    if ranges.as_parent("ranges") not in model.card.parents:
        return None
    return model.names("quantise_keep")
