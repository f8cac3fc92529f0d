"""ONNX graphs changed node by node, so that what comes out still parses and says something false. Pure, no I/O."""

from __future__ import annotations

import struct

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

from tests.reliability.fuzz.mutated_bytes import NUMBERS, TEXTS, Rng, pick, words

_SHARE_PLAUSIBLE, _TRIES = 0.75, 30
# Operators that allocate, loop, or read and write what a graph of ours has no business with.
_OPERATORS = (
    *("Fortune", "Loop", "If", "Scan", "Expand", "Tile", "ConstantOfShape", "Range", "Resize", "Reshape", "Gather"),
    *("MatMul", "Softmax", "Conv", "Pad", "Split", "Einsum", "NonZero", "OneHot", "QuantizeLinear", "StringNormalizer"),
)


def mutate_graph(data: bytes, rng: Rng) -> tuple[str, bytes]:
    """What was done to a graph, in words, and the file that comes of it.

    Most of the graphs are such that ONNX's checks have nothing against them: the others get no further.
    """
    plausible = rng.random() < _SHARE_PLAUSIBLE
    for left in reversed(range(_TRIES if plausible else 1)):
        graph, done = onnx.ModelProto.FromString(data), []
        if plausible:  # recorded shapes would give a change away
            del graph.graph.value_info[:]
        for _ in range(int(rng.integers(1, 4))):
            change = pick(rng, _CHANGES)
            change(graph, rng)
            done.append(words(change))
        if not left or _is_plausible(graph):
            break
    return ", ".join(done), graph.SerializeToString()


def _is_plausible(graph: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(graph.SerializeToString(), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError):
        return False
    return True


def _change_attribute(model: onnx.ModelProto, rng: Rng) -> None:
    having = [node for node in model.graph.node if node.attribute]
    if not having:
        return
    node = pick(rng, having)
    attribute = pick(rng, node.attribute)
    if rng.random() < 0.2:
        attribute.type = int(rng.integers(0, 15))
    elif rng.random() < 0.2:
        attribute.name = pick(rng, TEXTS)
    elif rng.random() < 0.2:
        node.attribute.remove(attribute)
    else:
        attribute.i, attribute.f = int(pick(rng, NUMBERS)), float(pick(rng, (0, -1, 1e38, np.nan, np.inf)))
        for place in range(len(attribute.ints)):
            attribute.ints[place] = int(pick(rng, (attribute.ints[place], *NUMBERS)))


def _change_inputs(model: onnx.ModelProto, rng: Rng) -> None:
    node = pick(rng, [node for node in model.graph.node if node.input])
    names = [name for one in model.graph.node for name in (*one.input, *one.output)]
    at = int(rng.integers(len(node.input)))
    if rng.random() < 0.2:
        del node.input[at]
    elif rng.random() < 0.2:
        node.input.append(pick(rng, names))
    else:
        node.input[at] = pick(rng, (*TEXTS, *node.output, *(pick(rng, names) for _ in range(8))))


def _change_outputs(model: onnx.ModelProto, rng: Rng) -> None:
    node = pick(rng, [node for node in model.graph.node if node.output])
    names = [name for one in model.graph.node for name in one.output]
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


def _change_whole_numbers(model: onnx.ModelProto, rng: Rng) -> None:
    """Shapes, axes and indices that the graph computes with, where it has some."""
    having = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT64]
    if having:
        tensor = pick(rng, having)
        values = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 8 * 8], np.int64).tolist()
        tensor.raw_data = b"".join(struct.pack("<q", pick(rng, (*NUMBERS, old))) for old in values)


def _point_outside(model: onnx.ModelProto, rng: Rng) -> None:
    """A weight that is said to lie in a file outside the artifact, or in one that never ends."""
    tensor = pick(rng, model.graph.initializer)
    tensor.data_location = TensorProto.EXTERNAL
    if rng.random() < 0.5:
        tensor.ClearField("raw_data")
    lies = {
        "location": pick(rng, ("../card.json", "/etc/passwd", "/dev/zero", "card.json", "", "x\0y")),
        "offset": str(pick(rng, NUMBERS)),
        "length": str(pick(rng, NUMBERS)),
    }
    for key, value in lies.items():
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


def _add_a_body(model: onnx.ModelProto, rng: Rng) -> None:
    """A graph within the graph: one that loops for ever, or a function that calls itself."""
    node = pick(rng, model.graph.node)
    if rng.random() < 0.5:
        body = onnx.GraphProto(name="body")
        body.node.add(op_type="Identity", input=["again"], output=["goes_on"])
        body.input.extend([helper.make_tensor_value_info("turn", TensorProto.INT64, [])])
        body.input.extend([helper.make_tensor_value_info("again", TensorProto.BOOL, [])])
        body.output.extend([helper.make_tensor_value_info("goes_on", TensorProto.BOOL, [])])
        yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
        model.graph.initializer.append(yes)
        loop = helper.make_node("Loop", ["", "yes"], [], name="endless")
        loop.attribute.append(AttributeProto(name="body", type=AttributeProto.GRAPH, g=body))
        model.graph.node.insert(0, loop)
    else:
        node.op_type, node.domain = "Again", "own"
        call = onnx.NodeProto(op_type="Again", domain="own", input=["x"], output=["y"])
        function = onnx.FunctionProto(name="Again", domain="own", input=["x"], output=["y"], node=[call])
        model.functions.append(function)
        model.opset_import.add(domain="own", version=1)


_CHANGES = (
    _change_attribute,
    _change_inputs,
    _change_outputs,
    _change_operator,
    _move_nodes,
    _change_initialiser,
    _change_whole_numbers,
    _point_outside,
    _change_interface,
    _change_versions,
    _add_a_body,
)
