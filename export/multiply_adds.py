"""How much a graph multiplies, from the shapes of its products."""

from __future__ import annotations

import math

import onnx

Shapes = dict[str, tuple[int, ...]]


def multiply_adds(graph: onnx.ModelProto) -> int | None:
    """Multiply-adds of one image: those of MatMul, Gemm, Conv and Attention; None where a shape is not known.

    Args:
        graph: with one input, whose first axis is the batch.
    """
    one = onnx.ModelProto()
    one.CopyFrom(graph)
    one.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    # What the exporter noted has the free batch in it, and would not be inferred again.
    for value in one.graph.output:
        value.type.tensor_type.ClearField("shape")
    del one.graph.value_info[:]
    shapes = _shapes(onnx.shape_inference.infer_shapes(one, data_prop=True))
    products = (node for node in one.graph.node if node.op_type in _COUNTS)
    try:
        return sum(_COUNTS[node.op_type](node, shapes) for node in products)
    except KeyError:
        return None


def _shapes(graph: onnx.ModelProto) -> Shapes:
    """Shapes that are known in full, by tensor."""
    known: Shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    for value in (*graph.graph.input, *graph.graph.value_info, *graph.graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(axis.HasField("dim_value") for axis in tensor.shape.dim):
            known[value.name] = tuple(axis.dim_value for axis in tensor.shape.dim)
    return known


def _matmul(node: onnx.NodeProto, shapes: Shapes) -> int:
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: onnx.NodeProto, shapes: Shapes) -> int:
    transposed = any(one.name == "transA" and one.i for one in node.attribute)
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


def _conv(node: onnx.NodeProto, shapes: Shapes) -> int:
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])


def _attention(node: onnx.NodeProto, shapes: Shapes) -> int:
    """(batch, heads, tokens, width) of query, key and value: the products with key and with value."""
    query, key, value = (shapes[name] for name in node.input[:3])
    return math.prod(query[:3]) * key[2] * (query[3] + value[3])


_COUNTS = {"MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "Attention": _attention}
