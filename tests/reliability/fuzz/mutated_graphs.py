"""Seeded mutations of ONNX graphs, node by node, most of which still parse. No I/O."""

from __future__ import annotations

import struct

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

from tests.reliability.fuzz.mutated_bytes import NUMBERS, TEXTS, Rng, describe, pick

_SHARE_VALID, _MAX_TRIES = 0.75, 30
# Operators that allocate or loop, or that no exported graph has.
_OPERATORS = (
    *("Fortune", "Loop", "If", "Scan", "Expand", "Tile", "ConstantOfShape", "Range", "Resize", "Reshape", "Gather"),
    *("MatMul", "Softmax", "Conv", "Pad", "Split", "Einsum", "NonZero", "OneHot", "QuantizeLinear", "StringNormalizer"),
)


def mutate_graph(data: bytes, rng: Rng) -> tuple[str, bytes]:
    """Return the mutations in words, and the mutated graph.

    Most of the graphs pass ONNX's checker: the checker stops all others.
    """
    must_be_valid = rng.random() < _SHARE_VALID
    for tries_left in reversed(range(_MAX_TRIES if must_be_valid else 1)):
        graph, changes = onnx.ModelProto.FromString(data), []
        if must_be_valid:  # recorded shapes would contradict a change
            del graph.graph.value_info[:]
        for _ in range(int(rng.integers(1, 4))):
            change = pick(rng, _CHANGES)
            change(graph, rng)
            changes.append(describe(change))
        if not tries_left or _is_valid(graph):
            break
    return ", ".join(changes), graph.SerializeToString()


def _is_valid(graph: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(graph.SerializeToString(), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError):
        return False
    return True


def _change_attribute(model: onnx.ModelProto, rng: Rng) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    node = pick(rng, nodes)
    attribute = pick(rng, node.attribute)
    if rng.random() < 0.2:
        attribute.type = int(rng.integers(0, 15))
    elif rng.random() < 0.2:
        attribute.name = pick(rng, TEXTS)
    elif rng.random() < 0.2:
        node.attribute.remove(attribute)
    else:
        attribute.i, attribute.f = int(pick(rng, NUMBERS)), float(pick(rng, (0, -1, 1e38, np.nan, np.inf)))
        for index in range(len(attribute.ints)):
            attribute.ints[index] = int(pick(rng, (attribute.ints[index], *NUMBERS)))


def _change_inputs(model: onnx.ModelProto, rng: Rng) -> None:
    node = pick(rng, [node for node in model.graph.node if node.input])
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    index = int(rng.integers(len(node.input)))
    if rng.random() < 0.2:
        del node.input[index]
    elif rng.random() < 0.2:
        node.input.append(pick(rng, names))
    else:
        node.input[index] = pick(rng, (*TEXTS, *node.output, *(pick(rng, names) for _ in range(8))))


def _change_outputs(model: onnx.ModelProto, rng: Rng) -> None:
    node = pick(rng, [node for node in model.graph.node if node.output])
    names = [name for other in model.graph.node for name in other.output]
    node.output[0] = pick(rng, (*TEXTS, pick(rng, names), pick(rng, names)))


def _change_operator(model: onnx.ModelProto, rng: Rng) -> None:
    node = pick(rng, model.graph.node)
    node.op_type = pick(rng, (*_OPERATORS, pick(rng, model.graph.node).op_type))
    if rng.random() < 0.1:
        node.domain = pick(rng, ("com.microsoft", "ai.onnx.ml", "\x1b"))


def _move_nodes(model: onnx.ModelProto, rng: Rng) -> None:
    nodes = list(model.graph.node)
    node = onnx.NodeProto.FromString(pick(rng, nodes).SerializeToString())
    if rng.random() < 0.5:
        del model.graph.node[int(rng.integers(len(nodes)))]
    if rng.random() < 0.7:
        model.graph.node.insert(int(rng.integers(len(nodes))), node)


def _change_initialiser(model: onnx.ModelProto, rng: Rng) -> None:
    tensor = pick(rng, model.graph.initializer)
    action = int(rng.integers(8))
    if action == 0 and tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = int(pick(rng, NUMBERS))
    elif action == 1:
        tensor.dims.append(int(pick(rng, NUMBERS)))
    elif action == 2:
        tensor.data_type = int(rng.integers(0, 26))
    elif action == 3:
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
    elif action == 4:
        tensor.name = pick(rng, (*TEXTS, pick(rng, model.graph.initializer).name))
    elif action == 5:
        tensor.raw_data = b"\xff" * len(tensor.raw_data)
    elif action == 6:
        values = rng.permutation([*tensor.dims, *pick(rng, ((), (1,), (1, 1)))])
        del tensor.dims[:]
        tensor.dims.extend(values.astype(int).tolist())
    else:
        model.graph.initializer.remove(tensor)


def _change_integers(model: onnx.ModelProto, rng: Rng) -> None:
    """Change constants of shapes, axes and indices, if the graph has any."""
    tensors = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT64]
    if tensors:
        tensor = pick(rng, tensors)
        values = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 8 * 8], np.int64).tolist()
        tensor.raw_data = b"".join(struct.pack("<q", pick(rng, (*NUMBERS, old))) for old in values)


def _point_outside(model: onnx.ModelProto, rng: Rng) -> None:
    """Refer a weight to a file outside the artifact, or to a file without end."""
    tensor = pick(rng, model.graph.initializer)
    tensor.data_location = TensorProto.EXTERNAL
    if rng.random() < 0.5:
        tensor.ClearField("raw_data")
    reference = {
        "location": pick(rng, ("../card.json", "/etc/passwd", "/dev/zero", "card.json", "", "x\0y")),
        "offset": str(pick(rng, NUMBERS)),
        "length": str(pick(rng, NUMBERS)),
    }
    for key, value in reference.items():
        tensor.external_data.add(key=key, value=value)


def _change_interface(model: onnx.ModelProto, rng: Rng) -> None:
    value = pick(rng, (*model.graph.input, *model.graph.output, *model.graph.value_info[:8]))
    shape = value.type.tensor_type.shape
    action = int(rng.integers(4))
    if action == 0:
        value.name = pick(rng, TEXTS)
    elif action == 1:
        value.type.tensor_type.elem_type = int(rng.integers(0, 26))
    elif action == 2 or not shape.dim:
        shape.dim.add(dim_value=int(pick(rng, NUMBERS)))
    else:
        pick(rng, shape.dim).dim_value = int(pick(rng, NUMBERS))


def _change_versions(model: onnx.ModelProto, rng: Rng) -> None:
    opset = pick(rng, model.opset_import)
    if rng.random() < 0.3:
        model.ir_version = int(pick(rng, NUMBERS))
    elif rng.random() < 0.3:
        opset.domain = pick(rng, TEXTS)
    else:
        opset.version = int(pick(rng, (*NUMBERS, 11, 13, 17, 21)))


def _add_subgraph(model: onnx.ModelProto, rng: Rng) -> None:
    """Add an endless loop, or a recursive function."""
    node = pick(rng, model.graph.node)
    if rng.random() < 0.5:
        body = onnx.GraphProto(name="body")
        body.node.add(op_type="Identity", input=["again"], output=["continue"])
        body.input.extend([helper.make_tensor_value_info("turn", TensorProto.INT64, [])])
        body.input.extend([helper.make_tensor_value_info("again", TensorProto.BOOL, [])])
        body.output.extend([helper.make_tensor_value_info("continue", TensorProto.BOOL, [])])
        yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
        model.graph.initializer.append(yes)
        loop = helper.make_node("Loop", ["", "yes"], [], name="endless")
        loop.attribute.append(AttributeProto(name="body", type=AttributeProto.GRAPH, g=body))
        model.graph.node.insert(0, loop)
    else:
        node.op_type, node.domain = "Again", "custom"
        call = onnx.NodeProto(op_type="Again", domain="custom", input=["x"], output=["y"])
        function = onnx.FunctionProto(name="Again", domain="custom", input=["x"], output=["y"], node=[call])
        model.functions.append(function)
        model.opset_import.add(domain="custom", version=1)


_CHANGES = (
    _change_attribute,
    _change_inputs,
    _change_outputs,
    _change_operator,
    _move_nodes,
    _change_initialiser,
    _change_integers,
    _point_outside,
    _change_interface,
    _change_versions,
    _add_subgraph,
)
