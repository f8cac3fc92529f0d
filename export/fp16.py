"""FP16 graphs: half precision inside, FP32 at the input, the output and wherever FP16 cannot hold the values.

Precision lives in the graph: TensorRT 11 has no FP16 flag, it builds what the graph says.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vpr.common.errors import UserError
from vpr.inference.onnx_graph import reraise_as_graph_error, session_with_outputs
from vpr.inference.onnx_session import INPUT

_FP16_MAX = float(np.finfo(np.float16).max)
# Other images than those looked at may reach further.
_LIMIT = _FP16_MAX / 2
_BATCH = 8


@reraise_as_graph_error("FP16")
def to_fp16(graph: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of an FP32 graph that computes in FP16.

    The nodes from the last ``ReduceL2`` on (the L2 normalisation) keep FP32, and so do those named.

    Args:
        graph: FP32, from the dynamo exporter.
        keep: names of nodes to leave in FP32, those of :func:`find_overflow`.

    Raises:
        UserError: a weight beyond FP16's range.
    """
    model = onnx.shape_inference.infer_shapes(graph, strict_mode=True)
    body = model.graph
    kept = _kept(body, set(keep))
    floats = _float_tensors(body)
    del body.value_info[:]
    _convert_initialisers(body, kept)
    _cast_edges(body, kept, floats)
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def find_overflow(graph: onnx.ModelProto, inputs: NDArray[np.float32]) -> list[str]:
    """Names of the nodes whose values come within a factor of two of FP16's largest.

    These are nodes that read or write such a tensor, and LayerNormalizations whose sum of squared
    deviations does. The products inside ``Attention`` are not seen from outside.

    It must be asked of the FP32 graph: on a CPU, ONNX Runtime and OpenVINO compute FP16 graphs in FP32,
    so that an overflowing one looks perfect there.

    Args:
        graph: FP32.
        inputs: (n, 3, size, size) float32.
    """
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True)
    floats = _float_tensors(inferred.graph)
    made = [name for node in graph.graph.node for name in node.output if name in floats]
    session = session_with_outputs(inferred, made)
    found: set[str] = set()
    for start in range(0, len(inputs), _BATCH):
        batch = inputs[start : start + _BATCH]
        found |= _too_large(graph, {INPUT: batch, **dict(zip(made, session.run(made, {INPUT: batch}), strict=True))})
    return [node.name for node in graph.graph.node if node.name in found]


def _too_large(graph: onnx.ModelProto, seen: dict[str, NDArray[np.float32]]) -> set[str]:
    """Names of the nodes that the tensors of one batch put beyond the limit; NaN is beyond it."""
    large = {name for name, values in seen.items() if not np.abs(values).max(initial=0) <= _LIMIT}
    found = {node.name for node in graph.graph.node if large & {*node.input, *node.output}}
    for node in graph.graph.node:
        if node.op_type == "LayerNormalization":
            tokens = seen[node.input[0]].astype(np.float64)
            squares = ((tokens - tokens.mean(-1, keepdims=True)) ** 2).sum(-1)
            if not squares.max(initial=0) <= _LIMIT:
                found.add(node.name)
    return found


def _kept(body: onnx.GraphProto, names: set[str]) -> set[int]:
    """Positions of the nodes that stay FP32: those named, the final normalisation, and what dequantises for them."""
    kept = {i for i, node in enumerate(body.node) if node.name in names} | _tail(body)
    for i, node in enumerate(body.node):
        if node.op_type == "DequantizeLinear":
            users = {j for j, other in enumerate(body.node) if node.output[0] in other.input}
            if users and users <= kept:
                kept.add(i)
    return kept


def _tail(body: onnx.GraphProto) -> set[int]:
    """Positions of the last ReduceL2 and of everything computed from it."""
    starts = [i for i, node in enumerate(body.node) if node.op_type == "ReduceL2"]
    if not starts:
        return set()
    reached = {body.node[starts[-1]].output[0]}
    kept = {starts[-1]}
    for i, node in enumerate(body.node):
        if i > starts[-1] and reached & set(node.input):
            reached |= set(node.output)
            kept.add(i)
    return kept


def _float_tensors(body: onnx.GraphProto) -> set[str]:
    """Names of the FP32 tensors of a graph whose shapes are inferred."""
    values = [*body.input, *body.output, *body.value_info]
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def _convert_initialisers(body: onnx.GraphProto, kept: set[int]) -> None:
    """Halve the weights of FP16 nodes; one that an FP32 node reads too is there twice."""
    weights = {tensor.name: tensor for tensor in body.initializer if tensor.data_type == TensorProto.FLOAT}
    wide = {name for i in kept for name in body.node[i].input if name in weights}
    narrow: set[str] = set()
    for i, node in enumerate(body.node):
        if i in kept:
            continue
        _convert_attributes(node)
        for j, name in enumerate(node.input):
            if name in weights:
                narrow.add(name)
                node.input[j] = f"{name}_fp16" if name in wide else name
    for name in sorted(narrow):
        values = numpy_helper.to_array(weights[name])
        # The largest number of FP32 stands for infinity in the exporter's masks; FP16's does as well.
        endless = np.abs(values) >= np.finfo(np.float32).max
        values = np.where(endless, np.copysign(_FP16_MAX, values), values)
        if np.abs(values).max(initial=0) > _FP16_MAX:
            raise UserError(f"fp16: weight '{name}' is beyond FP16's range: serve this student in FP32 or BF16")
        if name in wide:
            body.initializer.append(numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
        else:
            weights[name].CopyFrom(numpy_helper.from_array(values.astype(np.float16), name))


def _convert_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def _cast_edges(body: onnx.GraphProto, kept: set[int], floats: set[str]) -> None:
    """Put a Cast on every edge between FP32 and FP16; inputs and outputs of the graph are FP32."""
    wide = {value.name for value in body.input} | {name for i in kept for name in body.node[i].output}
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()

    def cast(name: str, target: str, kind: int) -> None:
        if target not in done:
            done.add(target)
            nodes.append(helper.make_node("Cast", [name], [target], name=f"cast_{target}", to=kind))

    outputs = {value.name for value in body.output} & floats
    for i, node in enumerate(body.node):
        for j, name in enumerate(node.input):
            if name in floats and node.op_type != "Shape" and (name in wide) != (i in kept):
                node.input[j] = f"{name}_fp32" if i in kept else f"{name}_fp16"
                cast(name, node.input[j], TensorProto.FLOAT if i in kept else TensorProto.FLOAT16)
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        nodes.append(copy)
        for j, name in enumerate(node.output):
            if name in outputs and i not in kept:
                copy.output[j] = f"{name}_fp16"
                done.add(f"{name}_fp16")
                wide.add(name)
                cast(f"{name}_fp16", name, TensorProto.FLOAT)
    del body.node[:]
    body.node.extend(nodes)
