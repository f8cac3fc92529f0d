"""Insert explicit quantisation (Q/DQ) into an FP32 graph, in INT8 or FP8.

Quantisation is symmetric: weights per output channel, activations per tensor. The recipe ``linear`` quantises
products with a constant matrix. LayerNorm, softmax and attention keep the base precision, because quantising them
collapses a ViT (FQ-ViT, IJCAI 2022). ``full-mha`` adds the inputs of attention's own products. ``full`` also adds the
convolutions of a stem, whose outputs after a ReLU use only half of the symmetric range.
Biases stay in floating point, because TensorRT's parser rejects quantised INT32 biases.
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calibration import onnx_layers
from export.config import QuantDtype, Recipe
from vpr.common.errors import UserError
from vpr.inference.int8 import LEVELS, activation_scale, weight_scales
from vpr.inference.onnx_file import check_well_formed
from vpr.inference.onnx_graph import reraise_as_graph_error

_FP8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
_MAX_FP8 = 448.0


@reraise_as_graph_error("Q/DQ")
def quantise(
    graph: onnx.ModelProto,
    thresholds: Mapping[str, float],
    layers: Collection[str],
    dtype: QuantDtype = "int8",
    corrections: Mapping[str, NDArray[np.float32]] | None = None,
) -> onnx.ModelProto:
    """Return a copy of an FP32 graph with Q/DQ before each of the given layers, from :func:`quantised_nodes`.

    Args:
        graph: FP32 graph.
        thresholds: Magnitude that maps to the largest quantised value, by tensor.
        layers: Names of the nodes to quantise.
        dtype: Eight-bit type; ``fp8`` is E4M3, for Ada and Hopper GPUs.
        corrections: (out,) float32 to subtract from the bias of a quantised linear, by module.

    Raises:
        UserError: A tensor has no range, or a correction does not fit the graph.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    _correct_biases(model, corrections or {}, layers)
    body = model.graph
    activations = {name: inputs for name, inputs in quantised_nodes(model, (), "full").items() if name in layers}
    weights = {tensor.name: tensor for tensor in body.initializer}
    weighted = {node.name for node in onnx_layers.weighted_nodes(model)}
    inserted: dict[str, list[onnx.NodeProto]] = {}
    dequantised: dict[str, str] = {}
    for node in (node for node in body.node if node.name in activations):
        pairs = inserted.setdefault(node.name, [])
        for position, name in enumerate(activations[node.name]):
            if name not in thresholds:
                raise UserError(f"ranges: no range for '{name}', read by '{node.name}'. Rerun `vpr calibrate`.")
            if name not in dequantised:
                dequantised[name] = _quantise_activation(body, name, thresholds[name], pairs, dtype)
            node.input[position] = dequantised[name]
        if node.name in weighted:
            weight = node.input[1]
            if weight not in dequantised:
                dequantised[weight] = _quantise_weight(
                    body, weights[weight], onnx_layers.channel_axis(node), pairs, dtype
                )
            node.input[1] = dequantised[weight]
    _insert_before(body, inserted)
    check_well_formed(model)
    return model


@reraise_as_graph_error("Q/DQ")
def quantised_nodes(
    graph: onnx.ModelProto, excluded: tuple[str, ...] | None = None, recipe: Recipe = "linear"
) -> dict[str, tuple[str, ...]]:
    """Return the nodes that a recipe quantises, by name, with the activations that each reads.

    ``excluded`` are name prefixes of nodes; None excludes the first and the last product with weights.
    """
    weighted = onnx_layers.weighted_nodes(graph)
    outer = {node.name for node in (*weighted[:1], *weighted[-1:])}
    products = weighted if recipe == "full" else onnx_layers.linear_nodes(graph)
    nodes: dict[str, tuple[str, ...]] = {node.name: (node.input[0],) for node in products}
    if recipe != "linear":
        nodes |= onnx_layers.attention_nodes(graph)
    if excluded is None:
        return {name: inputs for name, inputs in nodes.items() if name not in outer}
    return {name: inputs for name, inputs in nodes.items() if not name.startswith(excluded)}


def quantise_per_channel(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise a matrix or kernel to symmetric INT8 with one scale per channel.

    The weight is float32 of shape (rows, columns) or (out, in, height, width), with output channels along ``axis``. The
    result is int8 of the same shape, from -127 to 127, and (channels,) float32 scales.
    """
    scale = weight_scales(weight, axis)
    # The scale is rounded to FP16, so the largest value may exceed 127 slightly.
    steps = np.rint(weight / _broadcast(scale, axis, weight.ndim))
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scale


def _insert_before(body: onnx.GraphProto, inserted: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Insert nodes before the named nodes, and drop constants that no node reads any more."""
    ordered = [each for node in body.node for each in (*inserted.get(node.name, ()), node)]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    used = {name for node in nodes for name in node.input}
    used_tensors = [tensor for tensor in body.initializer if tensor.name in used]
    tensors = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in used_tensors]
    del body.node[:], body.initializer[:], body.value_info[:]
    body.node.extend(nodes)
    body.initializer.extend(tensors)


def _broadcast(scale: NDArray[np.float32], axis: int, dims: int) -> NDArray[np.float32]:
    """Reshape (channels,) scales so that they broadcast along one axis of ``dims``."""
    return scale.reshape([-1 if other == axis else 1 for other in range(dims)])


def _correct_biases(
    model: onnx.ModelProto, corrections: Mapping[str, NDArray[np.float32]], layers: Collection[str]
) -> None:
    for linear in onnx_layers.find_linears(model):
        if linear.module in corrections and linear.bias is not None and linear.node in layers:
            if corrections[linear.module].shape != linear.bias.shape:
                raise UserError(f"ranges: the correction of '{linear.module}' does not fit. Rerun `vpr calibrate`.")
            onnx_layers.replace_bias(model, linear, linear.bias - corrections[linear.module])


def _quantise_activation(
    body: onnx.GraphProto, name: str, limit: float, pairs: list[onnx.NodeProto], dtype: QuantDtype
) -> str:
    scale = activation_scale(limit, LEVELS if dtype == "int8" else _MAX_FP8)
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
        scale = weight_scales(matrix, axis, _MAX_FP8)
        steps = matrix / _broadcast(scale, axis, matrix.ndim)
        values = np.clip(steps, -_MAX_FP8, _MAX_FP8).astype(_FP8)
    body.initializer.append(numpy_helper.from_array(values, f"{name}_{dtype}"))
    body.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    body.initializer.append(numpy_helper.from_array(np.zeros(len(scale), values.dtype), f"{name}_zero"))
    inputs = [f"{name}_{dtype}", f"{name}_scale", f"{name}_zero"]
    pairs.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], name=f"{name}/DQ", axis=axis))
    return f"{name}_dq"
