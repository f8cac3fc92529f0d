"""Biases of quantised layers over FP16, kept where ONNX Runtime computes them exactly.

ONNX Runtime's optimiser ``WeightBiasQuantization`` (1.31, on by default) quantises the bias of a Conv or Gemm to INT32
if the layer is between a DequantizeLinear and a QuantizeLinear. It computes scale and quotient in the graph's type. In
FP16 the scale is subnormal, and the quotient is rounded to 11 bits or overflows. A trained student had cosine .9973.
A bias that an Add adds after the layer is left alone.
"""

from collections.abc import Callable, Collection

import onnx
from onnx import TensorProto, helper, numpy_helper

# Operators that ONNX Runtime moves a QuantizeLinear past, or removes before one.
_PASSED = frozenset(
    ["Cast", "Clip", "Flatten", "Identity", "MaxPool", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze"]
)
_LAYERS = ("Conv", "Gemm")

Readers = dict[str, list[onnx.NodeProto]]


def needs_separate_bias(graph: onnx.ModelProto, layers: Collection[str]) -> bool:
    """Return whether :func:`separate_biases` changes a graph over FP16 with these layers quantised."""
    readers = _readers(graph.graph)
    names = set(layers)
    layers_with_bias = (node for node in graph.graph.node if node.name in names and _has_bias(node))
    return any(_leads_to(node, readers, lambda reader: reader.name in names) for node in layers_with_bias)


def separate_biases(graph: onnx.ModelProto) -> None:
    """Move the FP16 biases of layers between DequantizeLinear and QuantizeLinear into an Add, in place."""
    body = graph.graph
    producers = {name: node.op_type for node in body.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in body.initializer}
    readers = _readers(body)
    nodes: list[onnx.NodeProto] = []
    for node in body.node:
        nodes.append(node)
        is_quantised = node.op_type in _LAYERS and producers.get(node.input[0]) == "DequantizeLinear"
        bias = tensors.get(node.input[2]) if is_quantised and _has_bias(node) else None
        if bias is None or bias.data_type != TensorProto.FLOAT16:
            continue
        if _leads_to(node, readers, lambda reader: reader.op_type == "QuantizeLinear"):
            nodes.append(_add_after(node, bias, body))
    if len(nodes) > len(body.node):
        _replace_nodes(body, nodes)


def _add_after(node: onnx.NodeProto, bias: TensorProto, body: onnx.GraphProto) -> onnx.NodeProto:
    """Return an Add with the layer's output, and take the bias from the layer."""
    values = numpy_helper.to_array(bias)
    if node.op_type == "Conv":
        values = values.reshape(-1, 1, 1)
    for attribute in node.attribute:
        if attribute.name == "beta":
            values = (values * attribute.f).astype(values.dtype)
    output, constant = node.output[0], f"{node.output[0]}/bias"
    body.initializer.append(numpy_helper.from_array(values, constant))
    node.output[0] = f"{output}/product"
    del node.input[2]
    return helper.make_node("Add", [node.output[0], constant], [output], name=f"{node.name}_bias")


def _replace_nodes(body: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Replace the nodes, and drop constants that no node reads any more."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    used = {name for node in copies for name in node.input}
    for index in reversed(range(len(body.initializer))):
        if body.initializer[index].name not in used:
            del body.initializer[index]
    del body.node[:]
    body.node.extend(copies)


def _has_bias(node: onnx.NodeProto) -> bool:
    return node.op_type in _LAYERS and len(node.input) > 2 and bool(node.input[2])


def _leads_to(node: onnx.NodeProto, readers: Readers, is_target: Callable[[onnx.NodeProto], bool]) -> bool:
    """Return whether only targets read a node's output, directly or through operators that are passed."""
    while True:
        following = readers.get(node.output[0], [])
        if following and all(map(is_target, following)):
            return True
        if len(following) != 1 or following[0].op_type not in _PASSED:
            return False
        node = following[0]


def _readers(body: onnx.GraphProto) -> Readers:
    readers: Readers = {}
    for node in body.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers
