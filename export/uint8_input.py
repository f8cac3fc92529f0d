"""Graphs that take uint8 pixels and normalise inside: a quarter of the bytes, and no arithmetic in the client."""

from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from vpr.imaging.preprocess import Preprocess
from vpr.inference.onnx_file import check_well_formed
from vpr.inference.onnx_graph import reraise_as_graph_error
from vpr.inference.onnx_session import INPUT

_SCOPE = "normalise"
NODES = tuple(f"{_SCOPE}/{operator}" for operator in ("Cast", "Transpose", "Mul", "Add"))  # FP32 in every graph
_FLOATS = f"{_SCOPE}/floats"


@reraise_as_graph_error("uint8 input")
def take_uint8(graph: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """Return an FP32 graph with the input of ``preprocess``: uint8, in its layout, normalised by its mean and std.

    The graph's input is normalised float32 in NCHW. The cast comes first, because TensorRT accepts no other operator
    on uint8.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    body = model.graph
    for node in body.node:
        for position, name in enumerate(node.input):
            if name == INPUT:
                node.input[position] = _FLOATS
    value = body.input[0]
    batch = value.type.tensor_type.shape.dim[0].dim_param
    body.input[0].CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [batch, *preprocess.input_shape]))
    scale, offset = preprocess.scale_offset()
    body.initializer.append(numpy_helper.from_array(scale, f"{_SCOPE}/scale"))
    body.initializer.append(numpy_helper.from_array(offset, f"{_SCOPE}/offset"))
    nodes = [_node("Cast", [INPUT], "cast", to=TensorProto.FLOAT)]
    if preprocess.layout == "NHWC":
        nodes.append(_node("Transpose", [nodes[-1].output[0]], "transpose", perm=[0, 3, 1, 2]))
    nodes.append(_node("Mul", [nodes[-1].output[0], f"{_SCOPE}/scale"], "scaled"))
    nodes.append(helper.make_node("Add", [nodes[-1].output[0], f"{_SCOPE}/offset"], [_FLOATS], name=f"{_SCOPE}/Add"))
    for node in reversed(nodes):
        body.node.insert(0, node)
    check_well_formed(model)
    return model


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [f"{_SCOPE}/{output}"], name=f"{_SCOPE}/{operator}", **attributes)
