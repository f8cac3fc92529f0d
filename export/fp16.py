"""FP16 graphs: half precision inside, FP32 at the input and output and where FP16 cannot represent the values.

The graph sets the precision: TensorRT 11 has no FP16 flag and builds the types that the graph contains.
"""

from collections.abc import Collection, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.bias import separate_biases
from export.uint8_input import NODES
from vpr.common.errors import UserError
from vpr.imaging.preprocess import ModelInput
from vpr.inference.onnx_file import check_well_formed, infer_shapes, infer_types
from vpr.inference.onnx_graph import reraise_as_graph_error, session_with_outputs
from vpr.inference.onnx_session import INPUT

_MAX_FP16 = float(np.finfo(np.float16).max)
# The margin covers images other than those examined.
_MAX_MAGNITUDE = _MAX_FP16 / 2
_BATCH = 8
_MAX_BYTES = 1 << 30  # of the tensors of a batch


@reraise_as_graph_error("FP16")
def to_fp16(graph: onnx.ModelProto, fp32_nodes: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy of an FP32 graph from the dynamo exporter that computes in FP16.

    The nodes from the last ``ReduceL2`` on (the L2 normalisation) stay FP32, as do those of :func:`find_overflow`.
    Biases of quantised layers become an Add where ONNX Runtime would round them (:mod:`export.bias`).
    :class:`UserError` if a weight exceeds FP16's range.
    """
    model = infer_shapes(graph, strict=True)
    body = model.graph
    fp32 = _fp32_positions(body, set(fp32_nodes))
    floats = _float_tensors([*body.input, *body.output, *body.value_info])
    del body.value_info[:]
    _convert_initialisers(body, fp32)
    _cast_edges(body, fp32, floats)
    separate_biases(model)
    check_well_formed(model)
    return infer_shapes(model, strict=True)


def find_overflow(graph: onnx.ModelProto, inputs: ModelInput) -> list[str]:
    """Return the names of nodes whose values exceed half of FP16's largest value, on n inputs of the graph.

    These are nodes that read or write such a tensor, and LayerNormalizations and L2 norms whose sum of squares is that
    large. The products inside ``Attention`` are not visible from outside.

    The graph must be FP32: on a CPU, ONNX Runtime and OpenVINO compute FP16 graphs in FP32, so an overflow would not
    show.
    """
    floats = _float_tensors(infer_types(graph))
    inner = [name for node in graph.graph.node for name in node.output if name in floats]
    session = session_with_outputs(graph, inner)
    overflowing: set[str] = set()
    image_bytes = sum(values.nbytes for values in session.run(inner, {INPUT: inputs[:1]}))
    size = min(max(_MAX_BYTES // max(image_bytes, 1), 1), _BATCH)
    for start in range(0, len(inputs), size):
        batch = inputs[start : start + size]
        tensors = dict(zip(inner, session.run(inner, {INPUT: batch}), strict=True))
        overflowing |= _overflowing_nodes(graph, {INPUT: batch, **tensors})
    return [node.name for node in graph.graph.node if node.name in overflowing]


def _overflowing_nodes(graph: onnx.ModelProto, tensors: dict[str, ModelInput]) -> set[str]:
    """Return the names of the nodes that exceed the limit in one batch; NaN counts as exceeding."""
    large = {name for name, values in tensors.items() if not np.abs(values).max(initial=0) <= _MAX_MAGNITUDE}
    nodes = {node.name for node in graph.graph.node if large & {*node.input, *node.output}}
    for node in graph.graph.node:
        if node.op_type == "LayerNormalization":
            tokens = tensors[node.input[0]].astype(np.float64)
            squares = ((tokens - tokens.mean(-1, keepdims=True)) ** 2).sum(-1)
            if not squares.max(initial=0) <= _MAX_MAGNITUDE:
                nodes.add(node.name)
        elif node.op_type == "ReduceL2" and not (tensors[node.output[0]] ** 2).max(initial=0) <= _MAX_MAGNITUDE:
            nodes.add(node.name)
    return nodes


def _fp32_positions(body: onnx.GraphProto, names: set[str]) -> set[int]:
    """Return the positions of FP32 nodes: named ones, the first and last normalisation, their DequantizeLinears."""
    fp32 = {i for i, node in enumerate(body.node) if node.name in names or node.name in NODES}
    fp32 |= _normalisation_positions(body)
    for i, node in enumerate(body.node):
        if node.op_type == "DequantizeLinear":
            readers = {j for j, other in enumerate(body.node) if node.output[0] in other.input}
            if readers and readers <= fp32:
                fp32.add(i)
    return fp32


def _normalisation_positions(body: onnx.GraphProto) -> set[int]:
    """Return the positions of the last ReduceL2 and of every node that depends on it."""
    starts = [i for i, node in enumerate(body.node) if node.op_type == "ReduceL2"]
    if not starts:
        return set()
    reached = {body.node[starts[-1]].output[0]}
    positions = {starts[-1]}
    for i, node in enumerate(body.node):
        if i > starts[-1] and reached & set(node.input):
            reached |= set(node.output)
            positions.add(i)
    return positions


def _float_tensors(values: Sequence[onnx.ValueInfoProto]) -> set[str]:
    """Return the names of the FP32 tensors."""
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def _convert_initialisers(body: onnx.GraphProto, fp32: set[int]) -> None:
    """Convert the weights of FP16 nodes; a weight that an FP32 node also reads is stored in both types."""
    weights = {tensor.name: tensor for tensor in body.initializer if tensor.data_type == TensorProto.FLOAT}
    read_by_fp32 = {name for i in fp32 for name in body.node[i].input if name in weights}
    read_by_fp32 |= {name for node in body.node for name in _fp32_constants(node) if name in weights}
    read_by_fp16: set[str] = set()
    for i, node in enumerate(body.node):
        if i in fp32:
            continue
        _convert_attributes(node)
        for j, name in enumerate(node.input):
            if name in weights and name not in _fp32_constants(node):
                read_by_fp16.add(name)
                node.input[j] = f"{name}_fp16" if name in read_by_fp32 else name
    for name in sorted(read_by_fp16):
        values = _to_half(name, numpy_helper.to_array(weights[name]))
        if name in read_by_fp32:
            body.initializer.append(numpy_helper.from_array(values, f"{name}_fp16"))
        else:
            weights[name].CopyFrom(numpy_helper.from_array(values, name))


def _fp32_constants(node: onnx.NodeProto) -> list[str]:
    """Return the inputs of a node that are FP32 in every precision: region and scales of a Resize."""
    return list(node.input[1:3]) if node.op_type == "Resize" else []


def _to_half(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    # The exporter's masks use FP32's largest number as infinity; FP16's largest number serves as well.
    is_infinite = np.abs(values) >= np.finfo(np.float32).max
    values = np.where(is_infinite, np.copysign(_MAX_FP16, values), values)
    if np.abs(values).max(initial=0) > _MAX_FP16:
        raise UserError(f"fp16: weight '{name}' exceeds FP16's range. Serve this model in FP32 or BF16.")
    return values.astype(np.float16)


def _convert_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def _cast_edges(body: onnx.GraphProto, fp32: set[int], floats: set[str]) -> None:
    """Insert a Cast on every edge between FP32 and FP16 nodes; the graph's inputs and outputs are FP32."""
    fp32_tensors = {value.name for value in body.input} | {name for i in fp32 for name in body.node[i].output}
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()

    def cast(name: str, target: str, dtype: int) -> None:
        if target not in done:
            done.add(target)
            nodes.append(helper.make_node("Cast", [name], [target], name=f"cast_{target}", to=dtype))

    outputs = {value.name for value in body.output} & floats
    for i, node in enumerate(body.node):
        for j, name in enumerate(node.input):
            if name in floats and node.op_type != "Shape" and (name in fp32_tensors) != (i in fp32):
                node.input[j] = f"{name}_fp32" if i in fp32 else f"{name}_fp16"
                cast(name, node.input[j], TensorProto.FLOAT if i in fp32 else TensorProto.FLOAT16)
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        nodes.append(copy)
        for j, name in enumerate(node.output):
            if name in outputs and i not in fp32:
                copy.output[j] = f"{name}_fp16"
                done.add(f"{name}_fp16")
                fp32_tensors.add(name)
                cast(f"{name}_fp16", name, TensorProto.FLOAT)
    del body.node[:]
    body.node.extend(nodes)
