"""Hostile ONNX graphs, safetensors files and cards."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from tests.reliability.cases import sign
from tests.reliability.fuzz.mutated_files import json_bytes
from tests.reliability.hostile.inputs import Hostile, write, zip_file

_INVALID_NUMBERS: tuple[Any, ...] = (
    -1,
    2**31,
    2**63,
    10**30,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "9" * 5000,
    [],
    None,
)
_INVALID_FIELDS: dict[str, tuple[Any, ...]] = {
    "shape": ([2**40, 2**40], [2**63], [-1], [], [1] * 100_000, None),
    "data_offsets": ([0, 2**63], [0, 2**40], [8, 0], [-8, 0], [0, 0], [2**40, 2**40 + 4], []),
    "dtype": ("F1", "", None, "F64", "pickle", "BOOL"),
}
PICKLE = b"\x80\x04cos\nsystem\n(S'touch escaped'\ntR."


def graphs() -> Iterator[Hostile]:
    """Yield graphs with external weights, with huge sizes, and files that are no graphs."""
    routes = ("ONNX Runtime", "calibrate")
    for name, change in _graph_changes():
        yield Hostile("ONNX", name, "rejected", routes, partial(_edit_graph, change))
    for name, data in {
        "a zip": zip_file("../x", b"x"),
        "an empty file": b"",
        "9 MB of ones": b"\xff" * (9 << 20),
    }.items():
        yield Hostile("ONNX", f"{name}, named .onnx", "rejected", routes, partial(_replace, "fp32", "model.onnx", data))


def _graph_changes() -> Iterator[tuple[str, Callable[[onnx.ModelProto], object]]]:
    locations = ("../card.json", "../../originals/fp32/model.onnx", "/etc/passwd", "/dev/zero", "card.json", "")
    for location in (*locations, "/proc/self/mem", "a/../../card.json", "~/.bashrc", "file:///etc/passwd"):
        reference = {"location": location, "offset": "0", "length": "4096"}
        yield f"weights in {location!r}", partial(_make_external, reference, False)
    for reference in ({"location": "x", "offset": "-1"}, {"location": "x", "length": str(2**63)}, {}):
        yield f"external weights: {reference}", partial(_make_external, reference, True)
    for location in ("/etc/passwd", "../card.json"):
        yield f"a constant in {location!r}", partial(_add_external_constant, {"location": location})
    yield from (
        ("a weight of 2^60 numbers", _set_huge_shape),
        ("opset 2^40", _set_opset),
        ("a recursive function", _add_recursion),
    )


def weights() -> Iterator[Hostile]:
    """Yield safetensors files with an invalid header, and other files with their suffix."""
    routes = ("student embed", "export onnx")
    for key, values in _INVALID_FIELDS.items():
        for value in values:
            put = partial(_edit_header, _first(key, value), None)
            yield Hostile("safetensors", f"{key} {str(value)[:40]}", "rejected", routes, put)
    for length in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1):
        put = partial(_edit_header, lambda header: None, length)
        yield Hostile("safetensors", f"a header of {length} bytes", "rejected", routes, put)
    for change, name in (
        (_add_tensors, "100,000 more tensors"),
        (_overlap, "tensors that overlap"),
        (dict.clear, "no tensors"),
    ):
        yield Hostile("safetensors", name, "rejected", routes, partial(_edit_header, change, None))
    for name, data in {"a pickle": PICKLE, "a zip": zip_file("../x", b"x")}.items():
        put = partial(_replace, "student", "model.safetensors", data)
        yield Hostile("safetensors", f"{name}, named .safetensors", "rejected", routes, put)


def cards() -> Iterator[Hostile]:
    """Yield cards with huge numbers, with files elsewhere, and files that are no cards."""
    routes = ("student embed",)
    for path in (("preprocess", "size"), ("embedding", "dim"), ("schema",), ("config", "model", "dim")):
        for value in _INVALID_NUMBERS:
            text = "10^400" if value == 10**400 else str(value)[:24]
            name = f"{'.'.join(path)} {text} ({type(value).__name__})"
            yield Hostile("card", name, "rejected", routes, partial(_edit_card, path, value))
    for key in ("image_size", "depth", "heads", "mlp_dim", "registers"):
        put = partial(_edit_card, ("config", "model", key), 10**9)
        yield Hostile("card", f"config.model.{key} 10^9", "rejected", routes, put)
    for name in ("../../escaped", "/etc/passwd", "..\\escaped", "a/../../../x", "card.json/x", ""):
        put = partial(_edit_card, ("files",), {name: {"size": 1, "sha256": "0" * 64}})
        yield Hostile("card", f"a file {name!r}", "rejected", routes, put)
    files = {
        "5 MB of blanks": b" " * (5 << 20),
        "100,000 brackets": b"[" * 100_000,
        "a number of 100,000 digits": b'{"schema": ' + b"9" * 100_000 + b"}",
        "HTML": b"<html>",
        "not UTF-8": b'{"schema": "\xff"}',
        "an empty file": b"",
    }
    for name, data in files.items():
        put = partial(write, "student/card.json", data)
        yield Hostile("card", f"{name} as the card", "rejected", routes, put)
    for target in ("/dev/zero", "/etc/passwd", "card.json"):
        yield Hostile("card", f"a link to {target}", "rejected", routes, partial(_replace_by_link, target))


def _edit_graph(change: Callable[[onnx.ModelProto], object], folder: Path) -> None:
    path = folder / "fp32" / "model.onnx"
    graph = onnx.load(path)
    change(graph)
    path.write_bytes(graph.SerializeToString())
    sign(folder, "fp32", "model.onnx")


def _set_huge_shape(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[0].dims[:] = [2**40, 2**20]


def _set_opset(graph: onnx.ModelProto) -> None:
    graph.opset_import[0].version = 2**40


def _add_recursion(graph: onnx.ModelProto) -> None:
    call = onnx.NodeProto(op_type="Again", domain="custom", input=["x"], output=["y"])
    graph.functions.append(onnx.FunctionProto(name="Again", domain="custom", input=["x"], output=["y"], node=[call]))


def _make_external(reference: dict[str, str], keep_data: bool, graph: onnx.ModelProto) -> None:
    tensor = graph.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    if not keep_data:
        tensor.ClearField("raw_data")
    for key, value in reference.items():
        tensor.external_data.add(key=key, value=value)


def _add_external_constant(reference: dict[str, str], graph: onnx.ModelProto) -> None:
    """Add a node with an attribute whose data is external."""
    tensor = onnx.TensorProto(name="x", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in reference.items():
        tensor.external_data.add(key=key, value=value)
    graph.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["outside"], value=tensor))


def _replace(artifact: str, file: str, data: bytes, folder: Path) -> None:
    (folder / artifact / file).write_bytes(data)
    sign(folder, artifact, file)


def _edit_header(change: Callable[[dict[str, Any]], object], length: int | None, folder: Path) -> None:
    path = folder / "student" / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json_bytes(header)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :])
    sign(folder, "student", "model.safetensors")


def _first(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Return a change of the first tensor with several numbers: with fewer, a wrong field could be correct."""

    def change(header: dict[str, Any]) -> None:
        next(entry for entry in header.values() if math.prod(entry.get("shape", [])) > 1)[key] = value

    return change


def _add_tensors(header: dict[str, Any]) -> None:
    header.update({f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)})


def _overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def _edit_card(path: tuple[str, ...], value: Any, folder: Path) -> None:
    file = folder / "student" / "card.json"
    card = json.loads(file.read_bytes())
    parent = card
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    file.write_bytes(json_bytes(card))
    sign(folder, "student", "card.json")


def _replace_by_link(target: str, folder: Path) -> None:
    card = folder / "student" / "card.json"
    card.unlink()
    card.symlink_to(target)
