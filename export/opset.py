"""Rewrite of a graph for older runtimes: the operators of opset 23 in those of opset 20."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vpr.common.errors import UserError
from vpr.inference.onnx_file import check_well_formed, infer_shapes
from vpr.inference.onnx_graph import reraise_as_graph_error

OLDEST_RUNTIME = "1.20"  # ONNX Runtime that loads the rewritten graphs; it loads opset 21 and IR version 10
_OPSET, _IR_VERSION = 20, 10
_SUPPORTED = ("scale", "softmax_precision", "qk_matmul_output_mode")  # attributes; others must have their default 0

Tensors = dict[str, onnx.TypeProto.Tensor]


@reraise_as_graph_error("opset")
def lower_opset(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph of at most opset 20 and IR version 10 with the same values, for ONNX Runtime 1.20 or newer.

    An ``Attention`` becomes two products around a softmax. The other operators that the toolkit exports compute the
    same in both opsets.

    Raises:
        UserError: An ``Attention`` is causal, caches keys, or its inputs are not (batch, heads, tokens, width).
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    if opset_of(model) > _OPSET:
        inferred = infer_shapes(model).graph
        tensors = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.input)}
        for stored in model.graph.initializer:  # of a mask, which shape inference does not list
            tensors[stored.name] = helper.make_tensor_type_proto(stored.data_type, stored.dims).tensor_type
        nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            nodes += _spell_out(node, tensors, model.graph) if node.op_type == "Attention" else [node]
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:], model.graph.value_info[:]
        model.graph.node.extend(nodes)
        for entry in model.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = _OPSET
    model.ir_version = min(model.ir_version, _IR_VERSION)
    check_well_formed(model)
    return model


def opset_of(graph: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators that a graph uses."""
    return max((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _spell_out(node: onnx.NodeProto, tensors: Tensors, body: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes of softmax(scale q k^T + mask) v, with names derived from those of the node and its output."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    types = [tensors.get(name) for name in node.input[:4] if name]
    is_supported = len(types) == len(node.input) and all(t is not None and t.HasField("shape") for t in types)
    is_supported &= not any(value for name, value in attributes.items() if name not in _SUPPORTED)
    is_supported &= not any(node.output[1:])
    if not is_supported or any(len(t.shape.dim) != 4 for t in types[:3] if t is not None):
        problem = "is an Attention that older runtimes cannot spell out"
        raise UserError(f"model: {node.name} {problem}. Export the graph with --opset 20.")
    assert types[0] is not None
    width, dtype = types[0].shape.dim[3].dim_value, helper.tensor_dtype_to_np_dtype(types[0].elem_type)
    name, output, (query, key, value) = node.name, node.output[0], node.input[:3]

    def add(operator: str, inputs: list[str], part: str, **settings: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [part], f"{name}/{part.rpartition('/')[2]}", **settings))
        return part

    def constant(part: str, number: float) -> str:
        body.initializer.append(numpy_helper.from_array(np.array(number, dtype=dtype), f"{output}/{part}"))
        return f"{output}/{part}"

    nodes: list[onnx.NodeProto] = []
    # Both factors by the root of the scale, as ONNX defines it, so that products do not overflow in 16 bits.
    root = constant("root", float(np.sqrt(attributes.get("scale") or width**-0.5)))
    turned = add("Transpose", [key], f"{output}/turned", perm=[0, 1, 3, 2])
    factors = [add("Mul", [query, root], f"{output}/query"), add("Mul", [turned, root], f"{output}/key")]
    scores = add("MatMul", factors, f"{output}/scores")
    if len(types) == 4 and types[3] is not None:
        mask = node.input[3]
        if types[3].elem_type == TensorProto.BOOL:
            choices = [mask, constant("kept", 0.0), constant("masked", float(np.finfo(dtype).min))]
            mask = add("Where", choices, f"{output}/mask")
        scores = add("Add", [scores, mask], f"{output}/added")
    shares = add("Softmax", [scores], f"{output}/shares", axis=-1)
    nodes.append(helper.make_node("MatMul", [shares, value], [output], f"{name}/MatMul"))
    return nodes
