"""``vpr export int8``: FP32 graph and ranges -> a graph with explicit quantisation of its linears.

Symmetric INT8: weights per output channel, activations per tensor. Only products with a constant
matrix are quantised (LayerNorm, softmax and attention keep the base precision: quantising those is
what collapses a ViT, see FQ-ViT, IJCAI 2022), and biases stay in floating point (TensorRT's parser
refuses quantised INT32 biases).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from calibration.calibrate import linear_nodes
from export.onnx_graph import count_operators, describe, load_onnx
from export.precision import to_fp16
from vpr.artifact import Artifact, find_current, load_artifact, plain, reading, write_artifact
from vpr.console import say
from vpr.errors import UserError
from vpr.int8 import KEEP, LEVELS, activation_scale, weight_scales


@dataclass(frozen=True)
class Int8Config:
    """An INT8 graph.

    Attributes:
        onnx: FP32 ``onnx`` artifact.
        ranges: ``ranges`` artifact measured on it.
        output: where the graph is written.
        base: precision of what is not quantised; ``fp16`` for TensorRT, ``fp32`` for CPU engines: OpenVINO
            computes the linears in INT8 over either, ONNX Runtime fuses them over ``fp32`` alone and is
            slower than without quantisation over ``fp16``.
        keep: linears whose names begin with one of these stay in the base precision.
    """

    onnx: str
    ranges: str
    output: str
    base: Literal["fp16", "fp32"] = "fp16"
    keep: tuple[str, ...] = KEEP


def export_int8(config: Int8Config) -> Path:
    """Insert Q/DQ and write an artifact of kind ``onnx``.

    Raises:
        UserError: ranges of another graph, a linear without a range, or nothing left to quantise.
    """
    graph, model = load_onnx(config.onnx)
    ranges = load_artifact(config.ranges, "ranges")
    _check_parents(config, model, ranges)
    parents = [model.as_parent("onnx"), ranges.as_parent("ranges")]
    values = {**plain(config), "precision": "int8"}
    if find_current(config.output, "onnx", values, parents):
        say(f"{config.output}: up to date")
        return Path(config.output)
    with reading(ranges):
        measured = json.loads(ranges.file("ranges.json").read_text(encoding="utf-8"))
        thresholds = {name: float(entry["threshold"]) for name, entry in measured.items()}
    quantised = quantise(graph, thresholds, config.keep)
    names = [n.name for n in linear_nodes(graph) if not n.name.startswith(config.keep)]
    wide = model.card.metrics.get("fp32_nodes", [])
    if config.base == "fp16":
        quantised = to_fp16(quantised, wide)
    with write_artifact(config.output, "onnx", values, parents) as draft:
        onnx.save(quantised, draft.path / "model.onnx")
        describe(draft, model, quantised)
        kept = [n.name for n in linear_nodes(graph) if n.name not in names]
        counts = count_operators(quantised)
        draft.metrics = {"quantised": names, "kept": kept, "fp32_nodes": wide, "nodes": counts}
    say(f"{config.output}: INT8 over {config.base.upper()}, {len(names)} linears quantised, {len(kept)} kept")
    return Path(config.output)


def quantise(graph: onnx.ModelProto, thresholds: dict[str, float], keep: tuple[str, ...]) -> onnx.ModelProto:
    """A copy of an FP32 graph with Q/DQ before every linear that is not kept.

    Args:
        graph: FP32.
        thresholds: magnitude that maps to 127, by the name of a linear's input.
        keep: beginnings of names of linears to leave alone.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    body = model.graph
    chosen = [node for node in linear_nodes(model) if not node.name.startswith(keep)]
    if not chosen:
        raise UserError(f"keep: {', '.join(keep)} leaves nothing to quantise: name fewer layers")
    weights = {tensor.name: tensor for tensor in body.initializer}
    before: dict[str, list[onnx.NodeProto]] = {}
    done: dict[str, str] = {}
    for node in chosen:
        activation, weight = node.input[0], node.input[1]
        if activation not in thresholds:
            raise UserError(
                f"ranges: no range for '{activation}', the input of '{node.name}': calibrate this graph again"
            )
        pairs = before.setdefault(node.name, [])
        if activation not in done:
            done[activation] = _quantise_activation(body, activation, thresholds[activation], pairs)
        if weight not in done:
            done[weight] = _quantise_weight(body, weights[weight], _channel_axis(node), pairs)
        node.input[0], node.input[1] = done[activation], done[weight]
    used = {name for node in body.node for name in node.input}
    ordered = [one for node in body.node for one in (*before.get(node.name, ()), node)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    used |= {name for node in copies for name in node.input}
    initialisers = [tensor for tensor in body.initializer if tensor.name in used]
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in initialisers]
    del body.node[:], body.initializer[:], body.value_info[:]
    body.node.extend(copies)
    body.initializer.extend(kept)
    onnx.checker.check_model(model)
    return model


def quantise_per_channel(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric INT8 of a matrix, one scale per channel of ``axis``.

    Args:
        weight: (rows, columns) float32.
        axis: 0 or 1, the output channels.

    Returns:
        int8 of the same shape, in -127…127, and (channels,) float32 scales.
    """
    scale = weight_scales(weight, axis)
    # Rounding the scale to FP16 may bring the largest value just above 127.
    steps = np.rint(weight / np.expand_dims(scale, 1 - axis))
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scale


def _quantise_activation(body: onnx.GraphProto, name: str, limit: float, pairs: list[onnx.NodeProto]) -> str:
    scale = activation_scale(limit)
    body.initializer.append(numpy_helper.from_array(np.array(scale), f"{name}_scale"))
    body.initializer.append(numpy_helper.from_array(np.array(0, np.int8), f"{name}_zero"))
    quantisation = [f"{name}_scale", f"{name}_zero"]
    pairs.append(helper.make_node("QuantizeLinear", [name, *quantisation], [f"{name}_q"], name=f"{name}/Q"))
    pairs.append(helper.make_node("DequantizeLinear", [f"{name}_q", *quantisation], [f"{name}_dq"], name=f"{name}/DQ"))
    return f"{name}_dq"


def _quantise_weight(body: onnx.GraphProto, tensor: onnx.TensorProto, axis: int, pairs: list[onnx.NodeProto]) -> str:
    name = tensor.name
    values, scale = quantise_per_channel(numpy_helper.to_array(tensor), axis)
    body.initializer.append(numpy_helper.from_array(values, f"{name}_int8"))
    body.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    body.initializer.append(numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{name}_zero"))
    inputs = [f"{name}_int8", f"{name}_scale", f"{name}_zero"]
    pairs.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], name=f"{name}/DQ", axis=axis))
    return f"{name}_dq"


def _channel_axis(node: onnx.NodeProto) -> int:
    """Axis of the output channels: rows of a transposed Gemm weight, else columns."""
    return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1


def _check_parents(config: Int8Config, model: Artifact, ranges: Artifact) -> None:
    if model.card.config.get("precision") != "fp32":
        raise UserError(f"{config.onnx}: Q/DQ is inserted into the FP32 graph: give that one, --base sets the rest")
    # A student that was fine-tuned under these very ranges keeps them.
    if model.as_parent("onnx") not in ranges.card.parents and ranges.as_parent("ranges") not in model.card.parents:
        raise UserError(
            f"{config.ranges}: measured on another graph than {config.onnx}: run 'vpr calibrate' on this one"
        )
    finished = model.card.metrics.get("quantise_keep")
    if ranges.as_parent("ranges") in model.card.parents and finished != list(config.keep):
        raise UserError(f"keep: the student was finished with [{', '.join(finished or ())}] kept: give the same")
