"""Files that were written wrong, by accident or on purpose: seeded mutations of real ones. Pure, no I/O.

Bytes are flipped, cut and moved whatever they mean; ONNX graphs, JSON and the headers of tensor files are also
changed field by field, so that what comes out still parses and says something false.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

Rng = np.random.Generator
_SHARE_OF_FIELDS = 0.8  # of the mutations of a file that has fields; the others change its bytes
_SHARE_PLAUSIBLE, _TRIES = 0.75, 30
_NUMBERS = (0, -1, 1, 7, 2**16, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63))
_DEEP = "deep nesting stands here"
_ODD: tuple[Any, ...] = (
    *(None, True, "", [], {}, -1, 0, 0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), -float("inf")),
    *(2**31, 2**63, 10**30, 10**400, "x" * 100_000, "\x1b[31m\n\u202e\ud800", "../../etc/passwd", "/dev/zero"),
    *("nan", [[[]]], {"": {}}, [1, "a", None], _DEEP),
)
_KINDS = ("catalog", "teacher", "student", "embeddings", "onnx", "ranges", "engine", "report", "spell")
_TEXTS = ("", "x", "pixels", "embedding", "../../etc/passwd", "\x1b[31m\n", "n" * 100_000)
# Operators that allocate, loop, or read and write what a graph of ours has no business with.
_OPERATORS = (
    *("Fortune", "Loop", "If", "Scan", "Expand", "Tile", "ConstantOfShape", "Range", "Resize", "Reshape", "Gather"),
    *("MatMul", "Softmax", "Conv", "Pad", "Split", "Einsum", "NonZero", "OneHot", "QuantizeLinear", "StringNormalizer"),
)


def mutate_file(name: str, data: bytes, rng: Rng) -> tuple[str, bytes]:
    """What was done to a file, in words, and the file that comes of it.

    Args:
        name: of the file; its suffix says what fields it has.
        data: a well-formed file.
        rng: the same generator gives the same mutation.
    """
    by_field = _BY_FIELD.get(name.rpartition(".")[2])
    if by_field is not None and rng.random() < _SHARE_OF_FIELDS:
        return by_field(data, rng)
    change = _pick(rng, _BYTES)
    return _words(change), change(data, rng)


def _pick(rng: Rng, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _words(change: Callable[..., Any]) -> str:
    return change.__name__.strip("_").replace("_", " ")


def _place(data: bytes, rng: Rng) -> int:
    """Somewhere in a file; as often as not near its beginning, where headers are."""
    return int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 256)))


def _flip_bits(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        changed[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut_off(data: bytes, rng: Rng) -> bytes:
    return data[: _pick(rng, (0, 1, 8, _place(data, rng), len(data) - 1))]


def _insert(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[at:]


def _repeat_a_piece(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at : at + int(rng.integers(1, 4096))] * int(rng.integers(2, 5)) + data[at:]


def _remove_a_piece(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + int(rng.integers(1, 256)) :]


def _zero_a_piece(data: bytes, rng: Rng) -> bytes:
    at, size = _place(data, rng), int(rng.integers(1, 64))
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def _lie_about_a_length(data: bytes, rng: Rng) -> bytes:
    """A number, as 4 or 8 bytes or as protobuf's varint, in place of what stands there."""
    at, number = _place(data, rng), int(_pick(rng, _NUMBERS))
    lies = (struct.pack("<q", number), struct.pack("<q", number)[:4], b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x07")
    lie = _pick(rng, lies)
    return data[:at] + lie + data[at + len(lie) :]


def _change_digits(data: bytes, rng: Rng) -> bytes:
    """A number that is written out in the first kilobytes, as headers do, becomes another."""
    runs = [i for i in range(min(len(data), 4096)) if data[i : i + 1].isdigit() and not data[i - 1 : i].isdigit()]
    if not runs:
        return _flip_bits(data, rng)
    start = end = _pick(rng, runs)
    while data[end : end + 1].isdigit():
        end += 1
    return data[:start] + str(_pick(rng, _NUMBERS)).encode() + data[end:]


_BYTES = (
    _flip_bits,
    _cut_off,
    _insert,
    _repeat_a_piece,
    _remove_a_piece,
    _zero_a_piece,
    _lie_about_a_length,
    _change_digits,
)


def mutate_json(value: Any, rng: Rng) -> str:
    """Change one to three places of JSON in place; says which. ``value`` is an object or a list."""
    done = []
    for _ in range(int(rng.integers(1, 4))):
        places = list(_places(value, ""))
        if not places:
            break
        path, parent, key = _pick(rng, places)
        done.append(f"{_change_place(parent, key, places, rng)} {path}")
    return ", ".join(done)


def _change_place(parent: Any, key: Any, places: list[Any], rng: Rng) -> str:
    action = _pick(rng, ("odd", "odd", "odd", "scale", "remove", "swap", "add"))
    old = parent[key]
    if action == "remove":
        del parent[key]
    elif action == "swap":
        _, other, name = _pick(rng, places)
        parent[key] = json.loads(json.dumps(other[name]))
    elif action == "add" and isinstance(parent, dict):
        parent[f"{key}{_pick(rng, _TEXTS)}"] = _pick(rng, _ODD)
    elif action == "scale" and isinstance(old, int | float) and abs(old) < 1e300:
        parent[key] = old * _pick(rng, (-1, 2, 1000, 10**9, 0.37))
    elif key == "kind":
        parent[key] = _pick(rng, _KINDS)
    else:
        parent[key] = json.loads(json.dumps(_pick(rng, _ODD)))
    return action


def _places(value: Any, path: str) -> Any:
    """(path, parent, key) of everything in JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield f"{path}/{str(key)[:40]}", value, key
        yield from _places(inner, f"{path}/{str(key)[:40]}")


def written(value: Any) -> bytes:
    """JSON as Python writes it, ``NaN`` and lone surrogates included; deep nesting where a place asks for it."""
    text = json.dumps(value, indent=1)
    return text.replace(json.dumps(_DEEP), "[" * 100_000 + "]" * 100_000).encode()


def _json_file(data: bytes, rng: Rng) -> tuple[str, bytes]:
    value = json.loads(data)
    done = mutate_json(value, rng)
    return done, written(value)


def _safetensors_file(data: bytes, rng: Rng) -> tuple[str, bytes]:
    """A header that lies: eight bytes of length, JSON of dtype, shape and offsets."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    done = mutate_json(header, rng)
    text = written(header)
    size = len(text) if rng.random() < 0.9 else int(_pick(rng, _NUMBERS)) % 2**64
    return f"header: {done}", size.to_bytes(8, "little") + text + data[8 + length :]


def _onnx_file(data: bytes, rng: Rng) -> tuple[str, bytes]:
    """Most of the graphs are such that ONNX's checks have nothing against them: the others get no further."""
    plausible = rng.random() < _SHARE_PLAUSIBLE
    for left in reversed(range(_TRIES if plausible else 1)):
        graph, done = onnx.ModelProto.FromString(data), []
        if plausible:  # recorded shapes would give a change away
            del graph.graph.value_info[:]
        for _ in range(int(rng.integers(1, 4))):
            change = _pick(rng, _GRAPH)
            change(graph, rng)
            done.append(_words(change))
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
    node = _pick(rng, having)
    attribute = _pick(rng, node.attribute)
    if rng.random() < 0.2:
        attribute.type = int(rng.integers(0, 15))
    elif rng.random() < 0.2:
        attribute.name = _pick(rng, _TEXTS)
    elif rng.random() < 0.2:
        node.attribute.remove(attribute)
    else:
        attribute.i, attribute.f = int(_pick(rng, _NUMBERS)), float(_pick(rng, (0, -1, 1e38, np.nan, np.inf)))
        for place in range(len(attribute.ints)):
            attribute.ints[place] = int(_pick(rng, (attribute.ints[place], *_NUMBERS)))


def _change_inputs(model: onnx.ModelProto, rng: Rng) -> None:
    node = _pick(rng, [node for node in model.graph.node if node.input])
    names = [name for one in model.graph.node for name in (*one.input, *one.output)]
    at = int(rng.integers(len(node.input)))
    if rng.random() < 0.2:
        del node.input[at]
    elif rng.random() < 0.2:
        node.input.append(_pick(rng, names))
    else:
        node.input[at] = _pick(rng, (*_TEXTS, *node.output, *(_pick(rng, names) for _ in range(8))))


def _change_outputs(model: onnx.ModelProto, rng: Rng) -> None:
    node = _pick(rng, [node for node in model.graph.node if node.output])
    names = [name for one in model.graph.node for name in one.output]
    node.output[0] = _pick(rng, (*_TEXTS, _pick(rng, names), _pick(rng, names)))


def _change_operator(model: onnx.ModelProto, rng: Rng) -> None:
    node = _pick(rng, model.graph.node)
    node.op_type = _pick(rng, (*_OPERATORS, _pick(rng, model.graph.node).op_type))
    if rng.random() < 0.1:
        node.domain = _pick(rng, ("com.microsoft", "ai.onnx.ml", "\x1b"))


def _move_nodes(model: onnx.ModelProto, rng: Rng) -> None:
    nodes = list(model.graph.node)
    node = onnx.NodeProto.FromString(_pick(rng, nodes).SerializeToString())
    if rng.random() < 0.5:
        del model.graph.node[int(rng.integers(len(nodes)))]
    if rng.random() < 0.7:
        model.graph.node.insert(int(rng.integers(len(nodes))), node)


def _change_initialiser(model: onnx.ModelProto, rng: Rng) -> None:
    tensor = _pick(rng, model.graph.initializer)
    action = int(rng.integers(8))
    if action == 0 and tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = int(_pick(rng, _NUMBERS))
    elif action == 1:
        tensor.dims.append(int(_pick(rng, _NUMBERS)))
    elif action == 2:
        tensor.data_type = int(rng.integers(0, 26))
    elif action == 3:
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
    elif action == 4:
        tensor.name = _pick(rng, (*_TEXTS, _pick(rng, model.graph.initializer).name))
    elif action == 5:
        tensor.raw_data = b"\xff" * len(tensor.raw_data)
    elif action == 6:
        values = rng.permutation([*tensor.dims, *_pick(rng, ((), (1,), (1, 1)))])
        del tensor.dims[:]
        tensor.dims.extend(values.astype(int).tolist())
    else:
        model.graph.initializer.remove(tensor)


def _change_whole_numbers(model: onnx.ModelProto, rng: Rng) -> None:
    """Shapes, axes and indices that the graph computes with, where it has some."""
    having = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT64]
    if having:
        tensor = _pick(rng, having)
        values = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 8 * 8], np.int64).tolist()
        tensor.raw_data = b"".join(struct.pack("<q", _pick(rng, (*_NUMBERS, old))) for old in values)


def _point_outside(model: onnx.ModelProto, rng: Rng) -> None:
    """A weight that is said to lie in a file outside the artifact, or in one that never ends."""
    tensor = _pick(rng, model.graph.initializer)
    tensor.data_location = TensorProto.EXTERNAL
    if rng.random() < 0.5:
        tensor.ClearField("raw_data")
    lies = {
        "location": _pick(rng, ("../card.json", "/etc/passwd", "/dev/zero", "card.json", "", "x\0y")),
        "offset": str(_pick(rng, _NUMBERS)),
        "length": str(_pick(rng, _NUMBERS)),
    }
    for key, value in lies.items():
        tensor.external_data.add(key=key, value=value)


def _change_interface(model: onnx.ModelProto, rng: Rng) -> None:
    value = _pick(rng, (*model.graph.input, *model.graph.output, *model.graph.value_info[:8]))
    shape = value.type.tensor_type.shape
    action = int(rng.integers(4))
    if action == 0:
        value.name = _pick(rng, _TEXTS)
    elif action == 1:
        value.type.tensor_type.elem_type = int(rng.integers(0, 26))
    elif action == 2 or not shape.dim:
        shape.dim.add(dim_value=int(_pick(rng, _NUMBERS)))
    else:
        _pick(rng, shape.dim).dim_value = int(_pick(rng, _NUMBERS))


def _change_versions(model: onnx.ModelProto, rng: Rng) -> None:
    opset = _pick(rng, model.opset_import)
    if rng.random() < 0.3:
        model.ir_version = int(_pick(rng, _NUMBERS))
    elif rng.random() < 0.3:
        opset.domain = _pick(rng, _TEXTS)
    else:
        opset.version = int(_pick(rng, (*_NUMBERS, 11, 13, 17, 21)))


def _add_a_body(model: onnx.ModelProto, rng: Rng) -> None:
    """A graph within the graph: one that loops for ever, or a function that calls itself."""
    node = _pick(rng, model.graph.node)
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


_GRAPH = (
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
_BY_FIELD: dict[str, Callable[[bytes, Rng], tuple[str, bytes]]] = {
    "onnx": _onnx_file,
    "json": _json_file,
    "safetensors": _safetensors_file,
}
