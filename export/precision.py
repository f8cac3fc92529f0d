"""FP16 graphs: half precision inside, FP32 at the input, the output and the final normalisation.

Precision lives in the graph: TensorRT 11 has no FP16 flag, it builds what the graph says.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vpr.errors import UserError

# A sum of squares leaves FP16's range early, and the input is pixels of the caller's: both stay FP32.
_FP32_OPERATORS = frozenset({"ReduceL2"})
_FP16_MAX = float(np.finfo(np.float16).max)


def to_fp16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an FP32 graph that computes in FP16.

    The nodes from the first ``ReduceL2`` on (the L2 normalisation) keep FP32. Weights that FP16 cannot
    hold are refused by name.

    Args:
        graph: FP32, from the dynamo exporter.

    Raises:
        UserError: a weight beyond FP16's range.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    body = model.graph
    kept = _tail(body)
    kept_inputs = {name for node in kept for name in node.input}
    half = {name for node in body.node if node not in kept for name in node.input}
    del body.value_info[:]
    _convert_initialisers(body, half, kept_inputs)
    for node in body.node:
        if node not in kept:
            _convert_attributes(node)
    _cast_edges(body, kept)
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _tail(body: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of the final normalisation: the last ReduceL2 and everything computed from it."""
    starts = [i for i, node in enumerate(body.node) if node.op_type in _FP32_OPERATORS]
    if not starts:
        return []
    reached = {body.node[starts[-1]].output[0]}
    kept = [body.node[starts[-1]]]
    for node in body.node[starts[-1] + 1 :]:
        if reached & set(node.input):
            reached |= set(node.output)
            kept.append(node)
    return kept


def _convert_initialisers(body: onnx.GraphProto, half: set[str], kept: set[str]) -> None:
    for tensor in body.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name not in half:
            continue
        if tensor.name in kept:
            raise UserError(f"fp16: '{tensor.name}' is shared with the normalisation: export the student again")
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max(initial=0) > _FP16_MAX:
            raise UserError(f"fp16: weight '{tensor.name}' is beyond FP16's range: serve this student in FP32 or BF16")
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))


def _convert_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def _cast_edges(body: onnx.GraphProto, kept: list[onnx.NodeProto]) -> None:
    """FP32 in, FP16 inside, FP32 from the normalisation on."""
    inputs = {value.name for value in body.input}
    made = {name for node in body.node if node not in kept for name in node.output}
    nodes: list[onnx.NodeProto] = [
        helper.make_node("Cast", [name], [f"{name}_fp16"], name=f"cast_{name}", to=TensorProto.FLOAT16)
        for name in sorted(inputs)
    ]
    widened: set[str] = set()
    for node in body.node:
        if node not in kept:
            for i, name in enumerate(node.input):
                if name in inputs and node.op_type != "Shape":
                    node.input[i] = f"{name}_fp16"
        else:
            for i, name in enumerate(node.input):
                if name in made and not _is_shape(body, name):
                    if name not in widened:
                        widened.add(name)
                        nodes.append(
                            helper.make_node(
                                "Cast", [name], [f"{name}_fp32"], name=f"cast_{name}", to=TensorProto.FLOAT
                            )
                        )
                    node.input[i] = f"{name}_fp32"
        nodes.append(node)
    if not kept:
        _widen_outputs(body, nodes)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del body.node[:]
    body.node.extend(copies)


def _is_shape(body: onnx.GraphProto, name: str) -> bool:
    """Whether a tensor is a shape (int64), which precision does not concern."""
    producers = {output: node for node in body.node for output in node.output}
    node = producers.get(name)
    while node is not None and node.op_type in ("Slice", "Concat", "Gather", "Squeeze", "Unsqueeze"):
        node = next((producers[n] for n in node.input if n in producers), None)
    return node is not None and node.op_type == "Shape"


def _widen_outputs(body: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    for value in body.output:
        for node in nodes:
            for i, name in enumerate(node.output):
                if name == value.name:
                    node.output[i] = f"{name}_fp16"
        nodes.append(
            helper.make_node(
                "Cast", [f"{value.name}_fp16"], [value.name], name=f"cast_{value.name}", to=TensorProto.FLOAT
            )
        )
