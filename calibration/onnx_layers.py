"""The layers of an exported graph that INT8 quantises: linears, convolutions and attention."""

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from vpr.inference.onnx_graph import reraise_as_graph_error


@dataclass(frozen=True)
class Linear:
    """A product with a constant matrix, and the bias that is added to it."""

    node: str  # name of the MatMul or Gemm node
    module: str  # PyTorch module of the node, such as ``vit.transformer.layers.0.0.to_qkv``
    input: str  # name of the input tensor
    matrix: str  # name of the weight's initialiser
    axis: int  # axis of the output channels in that initialiser
    weight: NDArray[np.float32]  # (in, out) float32
    adder: str  # name of the node that adds the bias, the Gemm itself or an Add; empty without a bias
    bias: NDArray[np.float32] | None  # (out,) float32, or None


def linear_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the products with a constant matrix, in order."""
    matrices = {tensor.name for tensor in graph.graph.initializer if len(tensor.dims) == 2}
    return [node for node in graph.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in matrices]


def weighted_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the products with constant weights, linears and the convolutions of a stem, in order."""
    body, linears = graph.graph, {node.name for node in linear_nodes(graph)}
    kernels = {tensor.name for tensor in body.initializer if len(tensor.dims) == 4}
    return [node for node in body.node if node.name in linears or (node.op_type == "Conv" and node.input[1] in kernels)]


def attention_nodes(graph: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Return the nodes that multiply two activations, with the tensors that ``full-mha`` quantises, by name."""
    constants = {tensor.name for tensor in graph.graph.initializer}
    nodes = {}
    for node in graph.graph.node:
        if node.op_type == "Attention":
            nodes[node.name] = tuple(node.input[:3])
        elif node.op_type == "MatMul" and not constants & set(node.input):
            nodes[node.name] = tuple(node.input)
    return nodes


def attention_inputs(graph: onnx.ModelProto) -> list[str]:
    """Return the tensors that :func:`attention_nodes` read, without duplicates."""
    return list(dict.fromkeys(name for names in attention_nodes(graph).values() for name in names))


def channel_axis(node: onnx.NodeProto) -> int:
    """Return the axis of the output channels in the weight: 0 of a kernel or transposed Gemm weight, else 1."""
    is_transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or is_transposed else 1


@reraise_as_graph_error("linears")
def find_linears(graph: onnx.ModelProto) -> list[Linear]:
    """Return all linears of a graph, in order."""
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    linears = []
    for node in linear_nodes(graph):
        axis = channel_axis(node)
        matrix = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
        weight = matrix.T if axis == 0 else matrix
        adder, bias = _find_bias(node, readers, constants)
        if bias is not None and bias.shape != (weight.shape[1],):
            adder, bias = "", None
        module = node.name.rpartition("/")[0]
        linears.append(Linear(node.name, module, node.input[0], node.input[1], axis, weight, adder, bias))
    return linears


def replace_constant(graph: onnx.ModelProto, node: str, old: str, values: NDArray[np.float32]) -> None:
    """Give one node a private constant in place of another; other readers keep the old constant."""
    body = graph.graph
    reader = next(candidate for candidate in body.node if candidate.name == node)
    name = f"{node}:{old}"
    for position, tensor_name in enumerate(reader.input):
        if tensor_name == old:
            reader.input[position] = name
    body.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    if not any(old in other.input for other in body.node):
        body.initializer.remove(next(tensor for tensor in body.initializer if tensor.name == old))


def replace_bias(graph: onnx.ModelProto, linear: Linear, bias: NDArray[np.float32]) -> None:
    """Give a linear, which has a bias, another one of the same shape, (out,) float32."""
    adder = next(node for node in graph.graph.node if node.name == linear.adder)
    constants = {tensor.name for tensor in graph.graph.initializer}
    position = 2 if adder.op_type == "Gemm" else next(i for i, name in enumerate(adder.input) if name in constants)
    replace_constant(graph, adder.name, adder.input[position], bias)


def _find_bias(
    node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], constants: dict[str, onnx.TensorProto]
) -> tuple[str, NDArray[np.float32] | None]:
    """Return the node that adds the bias of a linear, and the bias; an empty name and None without one."""
    if len(node.input) > 2:
        adder, biases = node.name, [node.input[2]]
    elif [reader.op_type for reader in readers.get(node.output[0], [])] == ["Add"]:
        add = readers[node.output[0]][0]
        adder, biases = add.name, [name for name in add.input if name in constants]
    else:
        return "", None
    if not biases or not adder:
        return "", None
    return adder, numpy_helper.to_array(constants[biases[0]]).astype(np.float32)
