"""``vpr export parity``: compare exports with their teacher or student, and find the first layer that differs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.backends.pytorch import load_module
from export.config import ParityConfig
from export.parity import parity, rank_changes
from export.to_onnx import load_onnx, run_graph
from vpr.artifacts.names import with_distinct_names
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import load_catalog
from vpr.data.pixels import read_pixels
from vpr.imaging.preprocess import ModelInput
from vpr.inference.onnx_graph import session_with_outputs
from vpr.inference.onnx_session import INPUT
from vpr.retrieval.cut import cut_vectors
from vpr.retrieval.embeddings import l2_normalize
from vpr.retrieval.self_search import find_own_images

log = get_logger(__name__)

_BATCH = 16
_LAYER_IMAGES = 8


def compare_exports(config: ParityConfig) -> Path:
    """Compare exports with their teacher or student and write an artifact of kind ``report`` with ``parity.json``.

    On CPUs FP16 graphs are computed in FP32: ``vpr export onnx`` finds FP16 overflow, this command does not.
    """
    reference = load_artifact(config.reference, ("teacher", "student"))
    catalog = load_catalog(config.catalog)
    exports = [load_onnx(path) for path in config.models]
    parents = [reference.as_parent(reference.card.kind), *(artifact.as_parent("onnx") for _, artifact in exports)]
    parents += catalog.as_parents()
    values = config_to_json(config)
    values = {reference.card.kind: values.pop("reference"), **values}  # as cards always named a student
    part = catalog.select(split=config.split)
    is_own = find_own_images(part)
    if is_own.any():
        values["queries_search"] = "leave-one-out"  # earlier versions let an image find itself
    stage = Stage(config.output, "report", values, parents, "parity.json")
    if stage.find():
        return stage.path
    preprocess = reference.card.preprocess
    if preprocess is None or not len(part):
        raise UserError(f"{config.catalog}: no images in the {config.split} split. Choose another --split.")
    for _, artifact in exports:
        if artifact.card.preprocess is None or artifact.card.preprocess.float_input != preprocess:
            raise UserError(f"{artifact.path}: preprocessing differs from {config.reference}. Use its exports.")
    model = load_module(reference)
    pixels = read_pixels(part, preprocess, range(len(part)))
    expected = l2_normalize(_run_network(model, preprocess.normalise(pixels)))
    named = with_distinct_names([artifact for _, artifact in exports])
    query, gallery = part.roles == "query", part.roles == "gallery"

    def rank(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.where(is_own, np.float32(-np.inf), vectors[query] @ vectors[gallery].T)

    rows = []
    for (graph, _), artifact in zip(exports, named, strict=True):
        assert artifact.card.preprocess is not None  # checked above
        inputs = artifact.card.preprocess.model_input(pixels)
        with reraise_as_artifact_error(artifact):
            actual = l2_normalize(run_graph(graph, inputs, _BATCH))
        same = _cut_like(expected, actual, artifact)
        row: dict[str, Any] = {"model": artifact.card.name, **parity(same, actual)}
        if query.any() and gallery.any():
            row |= rank_changes(rank(same), rank(actual))
        if config.layers:
            step = max(len(pixels) // _LAYER_IMAGES, 1)
            floats = preprocess.normalise(pixels[::step])
            row |= compare_layers(model, graph, floats, config.min_layer_cosine, inputs[::step])
        _log_row(artifact, row)
        rows.append(row)
    with stage.write() as draft:
        draft.catalog = catalog.summary()
        (draft.path / "parity.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    log.info(f"{config.output}: {len(rows)} models compared with {config.reference}")
    return stage.path


def _cut_like(expected: NDArray[np.float32], actual: NDArray[np.float32], artifact: Artifact) -> NDArray[np.float32]:
    """Return the reference's embeddings with the dimensions of a graph, which may be exported with fewer."""
    full, dim = expected.shape[1], actual.shape[1]
    if dim > full:
        raise UserError(f"{artifact.path}: {dim} dimensions, the reference has {full}. Compare its own exports.")
    return expected if dim == full else cut_vectors(expected, dim)


def compare_layers(
    model: nn.Module,
    graph: onnx.ModelProto,
    pixels: NDArray[np.float32],
    min_layer_cosine: float,
    inputs: ModelInput | None = None,
) -> dict[str, Any]:
    """Compare the outputs of the modules that PyTorch, in evaluation mode, and its export have in common.

    ``pixels`` are (n, 3, size, size) float32, and ``inputs`` the same images as the graph takes them, ``pixels`` if
    None. The result has ``layers``, with the ``cosine`` over all values and the ``max_abs`` of each module in order. It
    also has ``first_departing``, the first module below ``min_layer_cosine``, or None.
    """
    exported = graph_layers(graph, pixels if inputs is None else inputs)
    original = model_layers(model, pixels, set(exported))
    layers: list[dict[str, Any]] = []
    for name, values in exported.items():
        if name in original and original[name].size == values.size:
            metrics = parity(original[name].reshape(1, -1), values.reshape(1, -1))
            layers.append({"layer": name, "cosine": metrics["cosine_mean"], "max_abs": metrics["max_abs"]})
    first = next((layer["layer"] for layer in layers if not layer["cosine"] >= min_layer_cosine), None)
    return {"layers": layers, "first_departing": first}


def model_layers(model: nn.Module, pixels: NDArray[np.float32], names: set[str]) -> dict[str, NDArray[np.float32]]:
    """Return the outputs of the named PyTorch modules that have no children."""
    outputs: dict[str, NDArray[np.float32]] = {}
    hooks = []
    for name, module in model.named_modules():
        if name in names and not list(module.children()):

            def record(_: nn.Module, __: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                outputs[name] = output.detach().float().numpy()

            hooks.append(module.register_forward_hook(record))
    try:
        _run_network(model, pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def graph_layers(graph: onnx.ModelProto, pixels: ModelInput) -> dict[str, NDArray[np.float32]]:
    """Return the outputs of the modules of an export: of the last node that is named after the module."""
    last: dict[str, str] = {}
    for node in graph.graph.node:
        module, _, operator = node.name.rpartition("/")
        if module and not operator.startswith(("Q", "DQ")) and node.op_type not in ("Shape", "Cast"):
            last.pop(module, None)
            last[module] = node.output[0]
    names = list(dict.fromkeys(last.values()))
    outputs = dict(zip(names, session_with_outputs(graph, names).run(names, {INPUT: pixels}), strict=True))
    return {module: np.asarray(outputs[name], dtype=np.float32) for module, name in last.items()}


def _run_network(model: nn.Module, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        chunks = [model(torch.from_numpy(pixels[i : i + _BATCH])).numpy() for i in range(0, len(pixels), _BATCH)]
    return np.concatenate(chunks)


def _log_row(artifact: Artifact, row: dict[str, Any]) -> None:
    line = f"  {artifact.card.name}: mean cosine {row['cosine_mean']:.6f}  min {row['cosine_min']:.6f}"
    if "first_changed" in row:
        line += f"  first results changed {row['first_changed']:.2%}"
    if row.get("first_departing"):
        line += f"  first departing layer {row['first_departing']}"
    log.info(line)
