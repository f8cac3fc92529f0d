from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from vpr.artifacts.store import Embedding, load_artifact, write_artifact
from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess
from vpr.inference.onnx_graph import GraphSession, load_graph
from vpr.inference.onnx_session import INPUT, OUTPUT


def _graph() -> onnx.ModelProto:
    """The mean of each channel, and twice that."""
    nodes = [
        helper.make_node("ReduceMean", [INPUT, "axes"], ["mean"], name="mean", keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], [OUTPUT], name="head"),
    ]
    weight = np.concatenate([np.eye(3), 2 * np.eye(3)], axis=1).astype(np.float32)
    body = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(np.array([2, 3]), "axes"), numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _write(path: Path, graph: onnx.ModelProto) -> Path:
    with write_artifact(path, "onnx", {"precision": "fp32"}) as draft:
        (draft.path / "model.onnx").write_bytes(graph.SerializeToString())
        draft.preprocess = Preprocess(size=16)
        draft.embedding = Embedding(dim=6, normalised=True, dtype="float32")
    return path


def test_a_graph_is_loaded_and_run(tmp_path: Path) -> None:
    graph = load_graph(load_artifact(_write(tmp_path / "onnx", _graph())))
    pixels = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    (found,) = GraphSession(graph).run([OUTPUT], {INPUT: pixels})
    means = pixels.mean(axis=(2, 3))
    np.testing.assert_allclose(found, np.concatenate([means, 2 * means], axis=1), atol=1e-6)


def _outside(graph: onnx.ModelProto) -> None:
    weight = graph.graph.initializer[1]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="/dev/zero")


def _constant_outside(graph: onnx.ModelProto) -> None:
    _outside(graph)
    weight = graph.graph.initializer.pop()
    graph.graph.node.insert(0, helper.make_node("Constant", [], ["weight"], value=weight))


def _loop(graph: onnx.ModelProto) -> None:
    body = helper.make_graph([], "for ever", [], [])
    node = helper.make_node("Loop", ["", ""], [], name="endless")
    node.attribute.append(AttributeProto(name="body", type=AttributeProto.GRAPH, g=body))
    graph.graph.node.insert(0, node)


def _function(graph: onnx.ModelProto) -> None:
    call = helper.make_node("Again", ["x"], ["y"], domain="own")
    graph.functions.append(onnx.FunctionProto(name="Again", domain="own", input=["x"], output=["y"], node=[call]))


def _stranger(graph: onnx.ModelProto) -> None:
    graph.graph.node[0].domain = "com.example"


def _opset_to_come(graph: onnx.ModelProto) -> None:
    graph.opset_import[0].version = 2**31 - 1


def _opset_of_others(graph: onnx.ModelProto) -> None:
    graph.opset_import.add(domain="com.example", version=1)


def _unknown(graph: onnx.ModelProto) -> None:
    graph.graph.node[1].op_type = "Fortune"


def _cycle(graph: onnx.ModelProto) -> None:
    graph.graph.node[0].input[0] = OUTPUT


def _two_of_a_name(graph: onnx.ModelProto) -> None:
    graph.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3, 16, 16), np.float32), INPUT))


def _short(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[1].raw_data = graph.graph.initializer[1].raw_data[:8]


def _endless(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[1].dims[0] = 2**40


def _shapes_at_odds(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros((4, 6), np.float32), "weight"))


def _other_input(graph: onnx.ModelProto) -> None:
    graph.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 32


def _fixed_batch(graph: onnx.ModelProto) -> None:
    for value in (graph.graph.input[0], graph.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1


def _other_output(graph: onnx.ModelProto) -> None:
    graph.graph.node[1].output[0] = graph.graph.output[0].name = "logits"


def _none(graph: onnx.ModelProto) -> None:
    del graph.graph.output[:]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_outside, "a weight lies in another file"),
        (_constant_outside, "a weight lies in another file"),
        (_loop, "functions, loops or sparse weights"),
        (_function, "functions, loops or sparse weights"),
        (_stranger, r"node 'mean' \(ReduceMean\) is of the domain 'com.example'"),
        (_opset_to_come, "an opset other than ONNX's 1 to"),
        (_opset_of_others, "an opset other than ONNX's 1 to"),
        (_unknown, "No Op registered for Fortune .* Name: head"),
        (_cycle, "topologically sorted"),
        (_two_of_a_name, "two tensors have the same name"),
        (_short, "raw_data size .* is too small"),
        (_endless, "raw_data size .* is too small"),
        (_shapes_at_odds, r"node name: head\): .* Incompatible dimensions"),
        (_other_input, r"the one tensor 'pixels' of \(batch, 3, 16, 16\)"),
        (_fixed_batch, "the one tensor 'pixels'"),
        (_other_output, r"the one tensor 'embedding' of \(batch, 6\)"),
        (_none, "the one tensor 'embedding'|empty"),
    ],
)
def test_a_graph_that_no_export_writes_is_refused_in_a_line(
    tmp_path: Path, break_it: Callable[[onnx.ModelProto], None], message: str
) -> None:
    graph = _graph()
    break_it(graph)
    path = _write(tmp_path / "onnx", graph)
    with pytest.raises(UserError, match=message) as caught:
        load_graph(load_artifact(path))
    assert str(caught.value).startswith(f"{path}: is no usable onnx (")


def _put(path: Path, data: bytes) -> None:
    """Other bytes in a graph's place, with the checksum to fit."""
    (path / "model.onnx").write_bytes(data)
    card = json.loads((path / "card.json").read_text())
    card["files"]["model.onnx"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "card.json").write_text(json.dumps(card))


def test_bytes_that_are_no_graph_are_refused_in_a_line(tmp_path: Path) -> None:
    path = _write(tmp_path / "onnx", _graph())
    _put(path, b"\xff" * 200)
    with pytest.raises(UserError, match="is no usable onnx"):
        load_graph(load_artifact(path))


@pytest.mark.parametrize("name", [b"mean", b"weight"])
def test_a_name_that_is_no_text_is_refused_in_a_line(tmp_path: Path, name: bytes) -> None:
    path = _write(tmp_path / "onnx", _graph())
    _put(path, (path / "model.onnx").read_bytes().replace(name, b"\x84" + name[1:]))
    with pytest.raises(UserError, match="is no usable onnx .a name in it is no text"):
        load_graph(load_artifact(path))


def test_what_the_runtime_refuses_is_a_line_too() -> None:
    """Indices are not known before the graph runs."""
    graph = _graph()
    gather = helper.make_node("Gather", ["mean", "index"], ["first"], name="gather", axis=1)
    graph.graph.node.insert(1, gather)
    graph.graph.node[2].input[0] = "first"
    graph.graph.initializer.append(numpy_helper.from_array(np.array([0, 1, 9]), "index"))
    onnx.checker.check_model(graph, full_check=True)
    with pytest.raises(UserError, match=r"onnxruntime: cannot run the graph \(.*gather.*\): export the student again"):
        GraphSession(graph).run([OUTPUT], {INPUT: np.zeros((1, 3, 16, 16), np.float32)})
