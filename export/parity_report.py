"""``vpr export parity``: how far each export departs from the student, and at which layer it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.config import ParityConfig
from export.parity import parity, rank_changes
from export.to_onnx import load_onnx, run_graph
from student.model import Student, load_student
from vpr.artifacts.store import Artifact, config_to_json, find_up_to_date, reraise_as_artifact_error, write_artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import load_catalog
from vpr.inference.onnx_graph import session_with_outputs
from vpr.inference.onnx_session import INPUT
from vpr.retrieval.embeddings import l2_normalize, read_batches

log = get_logger(__name__)

_BATCH = 16
_LAYER_IMAGES = 8


def compare_exports(config: ParityConfig) -> Path:
    """Compare and write an artifact of kind ``report`` with ``parity.json``.

    On CPUs FP16 graphs are computed in FP32: what half precision cannot hold is found at the export, not here.
    """
    model, student = load_student(config.student)
    catalog = load_catalog(config.catalog)
    graphs = [load_onnx(path) for path in config.models]
    parents = [student.as_parent("student"), *(artifact.as_parent("onnx") for _, artifact in graphs)]
    parents += catalog.as_parents()
    if find_up_to_date(config.output, "report", config_to_json(config), parents, "parity.json"):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    part = catalog.select(split=config.split)
    preprocess = student.card.preprocess
    if preprocess is None or not len(part):
        raise UserError(f"{config.catalog}: no images of the {config.split} split: choose another")
    strangers = [artifact for _, artifact in graphs if artifact.card.preprocess != preprocess]
    if strangers:
        raise UserError(f"{strangers[0].path}: not preprocessed as {config.student}: give exports of this student")
    pixels = np.concatenate(list(read_batches(part, preprocess, _BATCH)))
    expected = l2_normalize(_run_student(model, pixels))
    query, gallery = part.roles == "query", part.roles == "gallery"
    rows = []
    for graph, artifact in graphs:
        with reraise_as_artifact_error(artifact):
            found = l2_normalize(run_graph(graph, pixels, _BATCH))
        row: dict[str, Any] = {"model": artifact.card.name, **parity(expected, found)}
        if query.any() and gallery.any():
            row |= rank_changes(expected[query] @ expected[gallery].T, found[query] @ found[gallery].T)
        if config.layers:
            row |= compare_layers(
                model, graph, pixels[:: max(len(pixels) // _LAYER_IMAGES, 1)], config.min_layer_cosine
            )
        _say(artifact, row)
        rows.append(row)
    with write_artifact(config.output, "report", config_to_json(config), parents) as draft:
        draft.catalog = catalog.summary()
        (draft.path / "parity.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    log.info(f"{config.output}: {len(rows)} models against {config.student}")
    return Path(config.output)


def compare_layers(
    model: Student, graph: onnx.ModelProto, pixels: NDArray[np.float32], min_layer_cosine: float
) -> dict[str, Any]:
    """Outputs of the modules that PyTorch and the graph have in common.

    Args:
        model: in evaluation mode.
        graph: its export in any precision.
        pixels: (n, 3, size, size) float32.
        departs: cosine below which a layer departs.

    Returns:
        ``layers``: for each module in order its ``cosine`` over all values and its ``max_abs``, and
        ``first_departing``: the first whose cosine is below, or None.
    """
    theirs = graph_layers(graph, pixels)
    ours = model_layers(model, pixels, set(theirs))
    found: list[dict[str, Any]] = []
    for name, values in theirs.items():
        if name in ours and ours[name].size == values.size:
            result = parity(ours[name].reshape(1, -1), values.reshape(1, -1))
            found.append({"layer": name, "cosine": result["cosine_mean"], "max_abs": result["max_abs"]})
    first = next((one["layer"] for one in found if not one["cosine"] >= min_layer_cosine), None)
    return {"layers": found, "first_departing": first}


def model_layers(model: nn.Module, pixels: NDArray[np.float32], names: set[str]) -> dict[str, NDArray[np.float32]]:
    """Outputs of some of PyTorch's modules, by name; of those without children, which a graph has whole."""
    found: dict[str, NDArray[np.float32]] = {}
    hooks = []
    for name, module in model.named_modules():
        if name in names and not list(module.children()):

            def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                found[name] = output.detach().float().numpy()

            hooks.append(module.register_forward_hook(keep))
    try:
        _run_student(model, pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def graph_layers(graph: onnx.ModelProto, pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Outputs of the modules of an export, by name: of the last node that carries the module's name."""
    last: dict[str, str] = {}
    for node in graph.graph.node:
        module, _, kind = node.name.rpartition("/")
        if module and not kind.startswith(("Q", "DQ")) and node.op_type not in ("Shape", "Cast"):
            last.pop(module, None)
            last[module] = node.output[0]
    names = list(dict.fromkeys(last.values()))
    found = dict(zip(names, session_with_outputs(graph, names).run(names, {INPUT: pixels}), strict=True))
    return {module: np.asarray(found[name], dtype=np.float32) for module, name in last.items()}


def _run_student(model: nn.Module, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        pieces = [model(torch.from_numpy(pixels[i : i + _BATCH])).numpy() for i in range(0, len(pixels), _BATCH)]
    return np.concatenate(pieces)


def _say(artifact: Artifact, row: dict[str, Any]) -> None:
    line = f"  {artifact.card.name}: cosine {row['cosine_mean']:.6f}, at least {row['cosine_min']:.6f}"
    if "first_changed" in row:
        line += f", {row['first_changed']:.2%} of the first results changed"
    if row.get("first_departing"):
        line += f", departs first at {row['first_departing']}"
    log.info(line)
