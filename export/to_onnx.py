"""``vpr export onnx``: student -> ONNX by the dynamo exporter, checked against PyTorch."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from export.config import MAX_BATCH, OnnxConfig
from export.fp16 import find_overflow, to_fp16
from export.parity import parity
from vpr.artifacts.store import (
    Artifact,
    ArtifactWriter,
    TensorSpec,
    config_to_json,
    find_up_to_date,
    load_artifact,
    write_artifact,
)
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import load_catalog
from vpr.data.pixels import read_pixels
from vpr.imaging.preprocess import Preprocess
from vpr.inference.onnx_graph import GraphSession, load_graph
from vpr.inference.onnx_session import INPUT, OUTPUT

if TYPE_CHECKING:  # running a graph or an engine needs no torch
    from student.model import Student

log = get_logger(__name__)

_BATCHES = (1, 3, 8)
_TOLERANCE = 1e-4


def export_onnx(config: OnnxConfig) -> Path:
    """Export, compare with PyTorch, and write an artifact of kind ``onnx``.

    The card's ``fp32_nodes`` are those that FP16 cannot hold, found on training images.

    Raises:
        UserError: the FP32 graph departs from PyTorch by more than 1e-4 anywhere.
    """
    from student.model import load_student

    model, student = load_student(config.student)
    # The ranges that a student was fine-tuned under are those of its INT8 graph.
    parents = [student.as_parent("student"), *student.parents("ranges")]
    values = config_to_json(config)
    if find_up_to_date(config.output, "onnx", values, parents):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    preprocess = student.card.preprocess
    if preprocess is None:
        raise UserError(f"{config.student}: its card has no preprocessing: distil it again")
    graph = trace(model, preprocess.size, config.opset)
    wide = find_overflow(graph, _inputs(config, preprocess, "train"))
    if wide:
        log.info(f"{config.output}: {len(wide)} nodes are beyond FP16's range and stay FP32, the first is {wide[0]}")
    if config.precision == "fp16":
        graph = to_fp16(graph, wide)
    metrics = _compare(model, graph, _inputs(config, preprocess, config.split), config)
    with write_artifact(config.output, "onnx", values, parents) as draft:
        onnx.save(graph, draft.path / "model.onnx")
        fill_graph_card(draft, student, graph)
        kept = {key: value for key, value in student.card.metrics.items() if key == "quantise_exclude_layers"}
        draft.metrics = {**metrics, **kept, "fp32_nodes": wide, "nodes": count_operators(graph)}
    log.info(
        f"{config.output}: {config.precision} graph, cosine to PyTorch {metrics['cosine_min']:.6f} at least, "
        f"max abs {metrics['max_abs']:.1e}"
    )
    return Path(config.output)


def trace(model: Student, size: int, opset: int) -> onnx.ModelProto:
    """A student as an FP32 graph with dynamic batch, the L2 normalisation inside.

    Args:
        model: in evaluation mode.
        size: side of the input, pixels.
        opset: ONNX opset version.
    """
    import torch

    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        opset_version=opset,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    if program is None:
        raise UserError("export: the exporter gave no program: report this with the versions of 'vpr doctor'")
    graph = program.model_proto
    _name_by_module(graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def fill_graph_card(draft: ArtifactWriter, model: Artifact, graph: onnx.ModelProto) -> None:
    """Fill the card's description of a graph that computes what ``model`` does."""
    draft.preprocess, draft.embedding, draft.catalog = model.card.preprocess, model.card.embedding, model.card.catalog
    draft.inputs = [_spec(value) for value in graph.graph.input]
    draft.outputs = [_spec(value) for value in graph.graph.output]


def load_onnx(path: Path | str) -> tuple[onnx.ModelProto, Artifact]:
    """Load an ``onnx`` artifact: the graph, checked, and the artifact."""
    artifact = load_artifact(path, "onnx")
    return load_graph(artifact), artifact


def run_graph(graph: onnx.ModelProto, inputs: NDArray[np.float32], batch_size: int = 8) -> NDArray[np.float32]:
    """(n, 3, size, size) to (n, dim) by ONNX Runtime on the CPU."""
    session = GraphSession(graph)
    starts = range(0, len(inputs), batch_size)
    return np.concatenate([session.embed(inputs[s : s + batch_size]) for s in starts])


def count_operators(graph: onnx.ModelProto) -> dict[str, int]:
    """Number of nodes by operator."""
    names = [node.op_type for node in graph.graph.node]
    return {name: names.count(name) for name in sorted(set(names))}


def _name_by_module(graph: onnx.ModelProto) -> None:
    """Name each node after the PyTorch module it comes from, and drop the exporter's stack traces."""
    seen: dict[str, int] = {}
    for node in graph.graph.node:
        scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        module = ast.literal_eval(scopes[0])[-2] if scopes else ""
        name = f"{module or 'student'}/{node.op_type}"
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        del node.metadata_props[:]


def _inputs(config: OnnxConfig, preprocess: Preprocess, split: str) -> NDArray[np.float32]:
    if config.catalog:
        part = load_catalog(config.catalog).select(split=split)
        if not len(part):
            raise UserError(f"{config.catalog}: no images of the {split} split: give another catalogue, or none")
        # Spread over the split: neighbours are views of one product.
        rows = np.linspace(0, len(part) - 1, min(config.images, len(part))).astype(int)
        pixels = np.concatenate([read_pixels(part, preprocess, range(row, row + 1)) for row in rows.tolist()])
    else:
        shape = (config.images, 3, preprocess.size, preprocess.size)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return preprocess.normalise(pixels)


def _compare(
    model: Student, graph: onnx.ModelProto, inputs: NDArray[np.float32], config: OnnxConfig
) -> dict[str, float]:
    import torch

    with torch.inference_mode():
        expected = model(torch.from_numpy(inputs)).numpy()
    worst: dict[str, float] = {}
    for batch in _BATCHES:
        found = parity(expected, run_graph(graph, inputs, batch))
        worst = {k: (max if k == "max_abs" else min)(v, worst.get(k, v)) for k, v in found.items()}
    if config.precision == "fp32" and worst["max_abs"] > _TOLERANCE:
        raise UserError(
            f"export: the graph departs from PyTorch by {worst['max_abs']:.2e} (limit {_TOLERANCE}): "
            "try --opset 20, and report this with the versions of 'vpr doctor'"
        )
    return {**worst, "images": float(len(inputs))}


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(name=value.name, dtype=dtype, shape=[d.dim_param or d.dim_value for d in tensor.shape.dim])
