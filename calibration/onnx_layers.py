"""The linears, convolutions and attentions of an exported graph: what INT8 is about in a ViT."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from vpr.inference.onnx_graph import reraise_as_graph_error


@dataclass(frozen=True)
class Linear:
    """A product with a constant matrix, and the constant that is added to it.

    Attributes:
        node: name of the MatMul or Gemm.
        module: the PyTorch module it comes from, such as ``vit.transformer.layers.0.0.to_qkv``.
        input: tensor that is multiplied.
        matrix: initialiser of the weight.
        axis: of the output channels in that initialiser.
        weight: (in, out) float32.
        adder: name of the node that adds the bias, the Gemm itself or an Add; empty without a bias.
        bias: (out,) float32, or None.
    """

    node: str
    module: str
    input: str
    matrix: str
    axis: int
    weight: NDArray[np.float32]
    adder: str
    bias: NDArray[np.float32] | None


def linear_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The products with a constant matrix."""
    constants = {tensor.name for tensor in graph.graph.initializer if len(tensor.dims) == 2}
    return [n for n in graph.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in constants]


def weighted_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The products with constant weights, linears and the convolutions of a stem, in order."""
    kernels = {tensor.name for tensor in graph.graph.initializer if len(tensor.dims) == 4}
    linears = {node.name for node in linear_nodes(graph)}
    return [n for n in graph.graph.node if n.name in linears or (n.op_type == "Conv" and n.input[1] in kernels)]


def attention_nodes(graph: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Nodes that multiply two activations, attention's, by name: the tensors that ``full-mha`` quantises there."""
    constants = {tensor.name for tensor in graph.graph.initializer}
    found = {}
    for node in graph.graph.node:
        if node.op_type == "Attention":
            found[node.name] = tuple(node.input[:3])
        elif node.op_type == "MatMul" and not constants & set(node.input):
            found[node.name] = tuple(node.input)
    return found


def attention_inputs(graph: onnx.ModelProto) -> list[str]:
    """Tensors read by :func:`attention_nodes`, each once."""
    return list(dict.fromkeys(name for names in attention_nodes(graph).values() for name in names))


def module_name(node: onnx.NodeProto) -> str:
    """The PyTorch module that a node of our export comes from, such as ``vit.transformer.layers.0.0.to_qkv``."""
    return node.name.rpartition("/")[0]


def channel_axis(node: onnx.NodeProto) -> int:
    """Axis of the output channels in the weight: the first of a kernel or a transposed Gemm weight, else columns."""
    return 0 if node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute) else 1


@reraise_as_graph_error("linears")
def find_linears(graph: onnx.ModelProto) -> list[Linear]:
    """All linears of a graph, in order."""
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in linear_nodes(graph):
        axis = channel_axis(node)
        matrix = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
        adder, bias = "", None
        added = [node.input[2]] if len(node.input) > 2 else []
        if added:
            adder = node.name
        elif [reader.op_type for reader in readers.get(node.output[0], [])] == ["Add"]:
            add = readers[node.output[0]][0]
            added = [name for name in add.input if name in constants]
            adder = add.name if added else ""
        if adder:
            bias = numpy_helper.to_array(constants[added[0]]).astype(np.float32)
        weight = matrix.T if axis == 0 else matrix
        if bias is not None and bias.shape != (weight.shape[1],):
            adder, bias = "", None
        found.append(Linear(node.name, module_name(node), node.input[0], node.input[1], axis, weight, adder, bias))
    return found


def replace_constant(graph: onnx.ModelProto, node: str, old: str, values: NDArray[np.float32]) -> None:
    """Give one node its own constant in another's place; others that read the old one keep it."""
    body = graph.graph
    reader = next(one for one in body.node if one.name == node)
    name = f"{node}:{old}"
    for position, read in enumerate(reader.input):
        if read == old:
            reader.input[position] = name
    body.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    if not any(old in one.input for one in body.node):
        body.initializer.remove(next(tensor for tensor in body.initializer if tensor.name == old))
