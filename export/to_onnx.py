"""``vpr export onnx``: export a teacher or student as ONNX with the dynamo exporter, and compare it with PyTorch."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export.config import MAX_BATCH, OnnxConfig
from export.cut_output import cut_output
from export.fp16 import find_overflow, to_fp16
from export.golden import write_graph_golden
from export.parity import parity
from export.transpose import move_transposes
from export.uint8_input import take_uint8
from vpr.artifacts.card import TensorSpec
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import ArtifactWriter, config_to_json
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.pixels import read_pixels
from vpr.data.seen import Use, record_seen
from vpr.imaging.preprocess import ModelInput, Preprocess
from vpr.inference.onnx_file import check_well_formed, save_graph
from vpr.inference.onnx_graph import GraphSession, load_graph
from vpr.inference.onnx_session import INPUT, OUTPUT
from vpr.retrieval.cut import check_dimensions, cut_vectors

if TYPE_CHECKING:  # running a graph or an engine needs no torch
    from torch import nn

log = get_logger(__name__)

_BATCHES = (1, 3, 8)
_TOLERANCE = 1e-4


def export_onnx(config: OnnxConfig) -> Path:
    """Export a teacher or student, compare it with PyTorch, and write an artifact of kind ``onnx``.

    The card's ``fp32_nodes`` lists the nodes whose values FP16 cannot represent, measured on training images.
    :class:`UserError` if the FP32 graph differs from PyTorch by more than 1e-4 in any value.
    """
    from export.backends.pytorch import load_module

    network = load_artifact(config.model, ("teacher", "student"))
    # The ranges of a student's QAT are also the ranges of its INT8 graph.
    parents = [network.as_parent(network.card.kind), *network.parents("ranges")]
    values = _values(config, network)
    stage = older = Stage(config.output, "onnx", values, parents)
    catalog = load_catalog(config.catalog) if config.catalog else None
    if catalog is not None and catalog.artifact is not None:
        stage = Stage(config.output, "onnx", {**values, "catalog_sha256": catalog.artifact.sha256}, parents)
    if stage.find() or (older is not stage and older.find()):  # earlier versions recorded the catalogue's path alone
        return stage.path
    if network.card.preprocess is None:
        raise UserError(f"{config.model}: the card has no preprocessing. Train the {network.card.kind} again.")
    if config.dimensions:
        check_dimensions(network, config.dimensions)
    preprocess = network.card.preprocess.model_copy(update={"dtype": config.input, "layout": config.layout})
    model = load_module(network)
    graph = trace(model, preprocess.size, config.opset)
    if config.dimensions:
        graph = cut_output(graph, config.dimensions)
    if config.input == "uint8":
        graph = take_uint8(graph, preprocess)
    fp32_nodes = find_overflow(graph, preprocess.model_input(_read_images(catalog, config, preprocess, "train")))
    if fp32_nodes:
        log.info(f"{config.output}: {len(fp32_nodes)} nodes exceed FP16's range and stay FP32, first {fp32_nodes[0]}")
    if config.precision == "fp16":
        graph = to_fp16(graph, fp32_nodes)
    metrics = _compare(model, graph, preprocess, _read_images(catalog, config, preprocess, config.split), config)
    with stage.write() as draft:
        save_graph(graph, draft.path)
        fill_graph_card(draft, network, graph)
        draft.preprocess = preprocess
        if config.dimensions and draft.embedding is not None:
            draft.embedding = draft.embedding.cut(config.dimensions)
        write_graph_golden(draft, graph)
        measured: dict[Use, Catalog] = {} if catalog is None else {"calibration": _sample(catalog, config, "train")}
        record_seen(draft.path, [network], measured)
        kept = {key: value for key, value in network.card.metrics.items() if key == "quantise_exclude_layers"}
        draft.metrics = {**metrics, **kept, "fp32_nodes": fp32_nodes, "nodes": count_operators(graph)}
    difference = f"min cosine to PyTorch {metrics['cosine_min']:.6f}, max abs difference {metrics['max_abs']:.1e}"
    log.info(f"{config.output}: {config.precision} graph, {difference}")
    return stage.path


def trace(model: nn.Module, size: int, opset: int) -> onnx.ModelProto:
    """Export a network as an FP32 graph with dynamic batch and L2 normalisation, for images of ``size`` pixels."""
    import torch

    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    tensors: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamic_shapes": ({0: batch},)}
    example = torch.zeros(2, 3, size, size)
    program = torch.onnx.export(model, (example,), dynamo=True, opset_version=opset, verbose=False, **tensors)
    if program is None:
        raise UserError("export: the exporter returned no program. Report this with the versions from `vpr doctor`.")
    graph = program.model_proto
    _name_by_module(graph, type(model).__name__.lower())
    move_transposes(graph)
    check_well_formed(graph)
    return graph


def fill_graph_card(draft: ArtifactWriter, model: Artifact, graph: onnx.ModelProto) -> None:
    """Fill the card of a graph that computes the same embeddings as ``model``."""
    draft.preprocess, draft.embedding, draft.catalog = model.card.preprocess, model.card.embedding, model.card.catalog
    draft.inputs = [_tensor_spec(value) for value in graph.graph.input]
    draft.outputs = [_tensor_spec(value) for value in graph.graph.output]


def load_onnx(path: Path | str) -> tuple[onnx.ModelProto, Artifact]:
    """Load an ``onnx`` artifact and its checked graph."""
    artifact = load_artifact(path, "onnx")
    return load_graph(artifact), artifact


def run_graph(graph: onnx.ModelProto, inputs: ModelInput, batch_size: int = 8) -> NDArray[np.float32]:
    """Embed n images, as the graph takes them, as (n, dim) with ONNX Runtime on the CPU."""
    session = GraphSession(graph)
    starts = range(0, len(inputs), batch_size)
    return np.concatenate([session.embed(inputs[start : start + batch_size]) for start in starts])


def count_operators(graph: onnx.ModelProto) -> dict[str, int]:
    """Count the nodes by operator."""
    return dict(sorted(Counter(node.op_type for node in graph.graph.node).items()))


def _values(config: OnnxConfig, network: Artifact) -> dict[str, Any]:
    """Return the JSON values that determine the graph; the network is named by its kind, as cards always did."""
    values = config_to_json(config)
    return {network.card.kind: values.pop("model"), **values}


def _name_by_module(graph: onnx.ModelProto, network: str) -> None:
    """Name each node after its PyTorch module, or the network, and drop the exporter's stack traces."""
    counts: dict[str, int] = {}
    for node in graph.graph.node:
        scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        module = ast.literal_eval(scopes[0])[-2] if scopes else ""
        name = f"{module or network}/{node.op_type}"
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        del node.metadata_props[:]


def _read_images(catalog: Catalog | None, config: OnnxConfig, preprocess: Preprocess, split: str) -> NDArray[np.uint8]:
    """Return images of a split as (n, 3, size, size) uint8; random pixels without a catalogue."""
    if catalog is not None:
        part = _sample(catalog, config, split)
        return np.concatenate([read_pixels(part, preprocess, range(row, row + 1)) for row in range(len(part))])
    shape = (config.images, 3, preprocess.size, preprocess.size)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _sample(catalog: Catalog, config: OnnxConfig, split: str) -> Catalog:
    """Return images that are spread over a split, since neighbouring rows are views of one product."""
    part = catalog.select(split=split)
    if not len(part):
        raise UserError(f"{config.catalog}: no images in the {split} split. Choose another --catalog or --split.")
    return part.take(np.linspace(0, len(part) - 1, min(config.images, len(part))).astype(np.int64))


def _compare(
    model: nn.Module, graph: onnx.ModelProto, preprocess: Preprocess, images: NDArray[np.uint8], config: OnnxConfig
) -> dict[str, float]:
    """Return the worst parity with PyTorch over several batch sizes."""
    import torch

    floats = torch.from_numpy(preprocess.normalise(images))
    with torch.inference_mode():
        expected = torch.cat([model(chunk) for chunk in floats.split(max(_BATCHES))]).numpy()
    expected = cut_vectors(expected, config.dimensions)
    worst: dict[str, float] = {}
    for batch in _BATCHES:
        metrics = parity(expected, run_graph(graph, preprocess.model_input(images), batch))
        for key, value in metrics.items():
            worst[key] = (max if key == "max_abs" else min)(value, worst.get(key, value))
    if config.precision == "fp32" and worst["max_abs"] > _TOLERANCE:
        remedy = "Try --opset 20, and report this with the versions from `vpr doctor`."
        raise UserError(f"export: graph and PyTorch differ by {worst['max_abs']:.2e} (limit {_TOLERANCE}). {remedy}")
    return {**worst, "images": float(len(images))}


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)
