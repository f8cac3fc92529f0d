"""FP32 graph and ranges -> a graph with explicit quantisation, INT8 or FP8.

Symmetric: weights per output channel, activations per tensor. The recipe ``linear`` quantises products with a
constant matrix (LayerNorm, softmax and attention keep the base precision: quantising those is what collapses a
ViT, see FQ-ViT, IJCAI 2022); ``full-mha`` the inputs of attention's own products too; ``full`` also a stem's
convolutions, whose outputs after a ReLU use half of the symmetric range.
Biases stay in floating point (TensorRT's parser refuses quantised INT32 biases).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calibration.onnx_layers import (
    attention_nodes,
    channel_axis,
    find_linears,
    linear_nodes,
    replace_constant,
    weighted_nodes,
)
from export.config import QuantDtype, Recipe
from vpr.common.errors import UserError
from vpr.inference.int8 import LEVELS, activation_scale, weight_scales
from vpr.inference.onnx_graph import reraise_as_graph_error

_FP8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
_FP8_LARGEST = 448.0


@reraise_as_graph_error("Q/DQ")
def quantise(
    graph: onnx.ModelProto,
    thresholds: Mapping[str, float],
    layers: Collection[str],
    dtype: QuantDtype = "int8",
    corrections: Mapping[str, NDArray[np.float32]] | None = None,
) -> onnx.ModelProto:
    """A copy of an FP32 graph with Q/DQ before each of some layers.

    Args:
        graph: FP32.
        thresholds: magnitude that maps to the largest number, by the name of a tensor.
        layers: nodes to quantise, of :func:`quantised_nodes`.
        dtype: ``int8``, or ``fp8``: E4M3, for Ada and Hopper GPUs.
        corrections: by the module of a linear, what is taken from its bias where it is quantised.

    Raises:
        UserError: a tensor without a range.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    _correct(model, corrections or {}, layers)
    body = model.graph
    chosen = {name: inputs for name, inputs in quantised_nodes(model, (), "full").items() if name in layers}
    weights = {tensor.name: tensor for tensor in body.initializer}
    weighted = {node.name for node in weighted_nodes(model)}
    before: dict[str, list[onnx.NodeProto]] = {}
    done: dict[str, str] = {}
    for node in (node for node in body.node if node.name in chosen):
        pairs = before.setdefault(node.name, [])
        for position, name in enumerate(chosen[node.name]):
            if name not in thresholds:
                raise UserError(f"ranges: no range for '{name}', an input of '{node.name}': calibrate this graph again")
            if name not in done:
                done[name] = _quantise_activation(body, name, thresholds[name], pairs, dtype)
            node.input[position] = done[name]
        if node.name in weighted:
            weight = node.input[1]
            if weight not in done:
                done[weight] = _quantise_weight(body, weights[weight], channel_axis(node), pairs, dtype)
            node.input[1] = done[weight]
    _put_before(body, before)
    onnx.checker.check_model(model)
    return model


@reraise_as_graph_error("Q/DQ")
def quantised_nodes(
    graph: onnx.ModelProto, keep: tuple[str, ...] | None = None, recipe: Recipe = "linear"
) -> dict[str, tuple[str, ...]]:
    """The nodes that a recipe quantises, by name, with the activations that each reads.

    Args:
        graph: FP32.
        keep: beginnings of names of nodes to leave alone; None leaves the first and the last product with weights.
        recipe: which products are quantised.
    """
    weighted = weighted_nodes(graph)
    outer = {node.name for node in (*weighted[:1], *weighted[-1:])}
    products = weighted if recipe == "full" else linear_nodes(graph)
    found: dict[str, tuple[str, ...]] = {node.name: (node.input[0],) for node in products}
    if recipe != "linear":
        found |= attention_nodes(graph)
    if keep is None:
        return {name: inputs for name, inputs in found.items() if name not in outer}
    return {name: inputs for name, inputs in found.items() if not name.startswith(keep)}


def quantise_per_channel(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric INT8 of a matrix or kernel, one scale per channel of ``axis``.

    Args:
        weight: float32, (rows, columns) or (out, in, height, width).
        axis: the output channels.

    Returns:
        int8 of the same shape, in -127…127, and (channels,) float32 scales.
    """
    scale = weight_scales(weight, axis)
    # Rounding the scale to FP16 may bring the largest value just above 127.
    steps = np.rint(weight / _along(scale, axis, weight.ndim))
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scale


def _put_before(body: onnx.GraphProto, before: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Put nodes before others, by the names of those; constants that nothing reads any more are dropped."""
    ordered = [one for node in body.node for one in (*before.get(node.name, ()), node)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    used = {name for node in copies for name in node.input}
    initialisers = [tensor for tensor in body.initializer if tensor.name in used]
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in initialisers]
    del body.node[:], body.initializer[:], body.value_info[:]
    body.node.extend(copies)
    body.initializer.extend(kept)


def _along(scale: NDArray[np.float32], axis: int, dims: int) -> NDArray[np.float32]:
    """(channels,) shaped so that it is broadcast along an axis of ``dims``."""
    return scale.reshape([-1 if one == axis else 1 for one in range(dims)])


def _correct(model: onnx.ModelProto, corrections: Mapping[str, NDArray[np.float32]], layers: Collection[str]) -> None:
    for linear in find_linears(model):
        if linear.module in corrections and linear.bias is not None and linear.node in layers:
            adder = next(node for node in model.graph.node if node.name == linear.adder)
            constants = {tensor.name for tensor in model.graph.initializer}
            position = 2 if adder.op_type == "Gemm" else next(i for i, x in enumerate(adder.input) if x in constants)
            if corrections[linear.module].shape != linear.bias.shape:
                raise UserError(f"ranges: correction of '{linear.module}' does not fit this graph: calibrate it again")
            corrected = linear.bias - corrections[linear.module]
            replace_constant(model, adder.name, adder.input[position], corrected)


def _quantise_activation(
    body: onnx.GraphProto, name: str, limit: float, pairs: list[onnx.NodeProto], dtype: QuantDtype
) -> str:
    scale = activation_scale(limit, LEVELS if dtype == "int8" else _FP8_LARGEST)
    zero = np.array(0, np.int8 if dtype == "int8" else _FP8)
    body.initializer.append(numpy_helper.from_array(np.array(scale), f"{name}_scale"))
    body.initializer.append(numpy_helper.from_array(zero, f"{name}_zero"))
    quantisation = [f"{name}_scale", f"{name}_zero"]
    pairs.append(helper.make_node("QuantizeLinear", [name, *quantisation], [f"{name}_q"], name=f"{name}/Q"))
    pairs.append(helper.make_node("DequantizeLinear", [f"{name}_q", *quantisation], [f"{name}_dq"], name=f"{name}/DQ"))
    return f"{name}_dq"


def _quantise_weight(
    body: onnx.GraphProto, tensor: onnx.TensorProto, axis: int, pairs: list[onnx.NodeProto], dtype: QuantDtype
) -> str:
    name, matrix = tensor.name, numpy_helper.to_array(tensor)
    if dtype == "int8":
        values, scale = quantise_per_channel(matrix, axis)
    else:
        scale = weight_scales(matrix, axis, _FP8_LARGEST)
        steps = matrix / _along(scale, axis, matrix.ndim)
        values = np.clip(steps, -_FP8_LARGEST, _FP8_LARGEST).astype(_FP8)
    body.initializer.append(numpy_helper.from_array(values, f"{name}_{dtype}"))
    body.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    body.initializer.append(numpy_helper.from_array(np.zeros(len(scale), values.dtype), f"{name}_zero"))
    inputs = [f"{name}_{dtype}", f"{name}_scale", f"{name}_zero"]
    pairs.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], name=f"{name}/DQ", axis=axis))
    return f"{name}_dq"
