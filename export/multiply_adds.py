"""Multiply-adds of a graph, from the shapes of its products."""

import math

import onnx

from vpr.inference.onnx_file import infer_shapes

Shapes = dict[str, tuple[int, ...]]


def multiply_adds(graph: onnx.ModelProto) -> int | None:
    """Count the multiply-adds of one image in MatMul, Gemm, Conv and Attention; None if a shape is unknown."""
    single = onnx.ModelProto()
    single.CopyFrom(graph)
    single.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    # The exporter's shapes contain the dynamic batch, and shape inference would not replace them.
    for value in single.graph.output:
        value.type.tensor_type.ClearField("shape")
    del single.graph.value_info[:]
    shapes = _static_shapes(infer_shapes(single, data=True))
    products = (node for node in single.graph.node if node.op_type in _COUNTERS)
    try:
        return sum(_COUNTERS[node.op_type](node, shapes) for node in products)
    except KeyError:
        return None


def _static_shapes(graph: onnx.ModelProto) -> Shapes:
    """Return the shapes without dynamic dimensions, by tensor."""
    shapes: Shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    for value in (*graph.graph.input, *graph.graph.value_info, *graph.graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(axis.HasField("dim_value") for axis in tensor.shape.dim):
            shapes[value.name] = tuple(axis.dim_value for axis in tensor.shape.dim)
    return shapes


def _count_matmul(node: onnx.NodeProto, shapes: Shapes) -> int:
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _count_gemm(node: onnx.NodeProto, shapes: Shapes) -> int:
    is_transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if is_transposed else 1]


def _count_conv(node: onnx.NodeProto, shapes: Shapes) -> int:
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])


def _count_attention(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Count the products with keys and with values; all three inputs are (batch, heads, tokens, width)."""
    query, key, value = (shapes[name] for name in node.input[:3])
    return math.prod(query[:3]) * key[2] * (query[3] + value[3])


_COUNTERS = {"MatMul": _count_matmul, "Gemm": _count_gemm, "Conv": _count_conv, "Attention": _count_attention}
