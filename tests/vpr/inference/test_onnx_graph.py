from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from vpr.artifacts.card import Embedding
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess
from vpr.inference.onnx_graph import GraphSession, load_graph
from vpr.inference.onnx_session import INPUT, OUTPUT


def _graph() -> onnx.ModelProto:
    """Return a graph that outputs the mean of each channel, and twice the mean."""
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


def test_graph_is_loaded_and_run(tmp_path: Path) -> None:
    graph = load_graph(load_artifact(_write(tmp_path / "onnx", _graph())))
    pixels = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    (embedding,) = GraphSession(graph).run([OUTPUT], {INPUT: pixels})
    means = pixels.mean(axis=(2, 3))
    np.testing.assert_allclose(embedding, np.concatenate([means, 2 * means], axis=1), atol=1e-6)


def test_process_that_may_use_one_core(capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime logs an error for each thread that it cannot bind to a core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        pixels = np.zeros((2, 3, 16, 16), np.float32)
        assert GraphSession(_graph()).embed(pixels).shape == (2, 6)
    finally:
        os.sched_setaffinity(0, allowed)
    assert capfd.readouterr().err == ""


def _external_weight(graph: onnx.ModelProto) -> None:
    weight = graph.graph.initializer[1]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="/dev/zero")


def _external_constant(graph: onnx.ModelProto) -> None:
    _external_weight(graph)
    weight = graph.graph.initializer.pop()
    graph.graph.node.insert(0, helper.make_node("Constant", [], ["weight"], value=weight))


def _loop(graph: onnx.ModelProto) -> None:
    body = helper.make_graph([], "endless", [], [])
    node = helper.make_node("Loop", ["", ""], [], name="endless")
    node.attribute.append(AttributeProto(name="body", type=AttributeProto.GRAPH, g=body))
    graph.graph.node.insert(0, node)


def _function(graph: onnx.ModelProto) -> None:
    call = helper.make_node("Again", ["x"], ["y"], domain="custom")
    graph.functions.append(onnx.FunctionProto(name="Again", domain="custom", input=["x"], output=["y"], node=[call]))


def _custom_domain(graph: onnx.ModelProto) -> None:
    graph.graph.node[0].domain = "com.example"


def _future_opset(graph: onnx.ModelProto) -> None:
    graph.opset_import[0].version = 2**31 - 1


def _custom_opset(graph: onnx.ModelProto) -> None:
    graph.opset_import.add(domain="com.example", version=1)


def _unknown_operator(graph: onnx.ModelProto) -> None:
    graph.graph.node[1].op_type = "Fortune"


def _cycle(graph: onnx.ModelProto) -> None:
    graph.graph.node[0].input[0] = OUTPUT


def _duplicate_name(graph: onnx.ModelProto) -> None:
    graph.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3, 16, 16), np.float32), INPUT))


def _truncated_weight(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[1].raw_data = graph.graph.initializer[1].raw_data[:8]


def _huge_weight(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[1].dims[0] = 2**40


def _contradicting_shapes(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros((4, 6), np.float32), "weight"))


def _other_input(graph: onnx.ModelProto) -> None:
    graph.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 32


def _fixed_batch(graph: onnx.ModelProto) -> None:
    for value in (graph.graph.input[0], graph.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1


def _other_output(graph: onnx.ModelProto) -> None:
    graph.graph.node[1].output[0] = graph.graph.output[0].name = "logits"


def _no_output(graph: onnx.ModelProto) -> None:
    del graph.graph.output[:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_external_weight, r"stores weight .weight. outside the artifact, in ..dev.zero."),
        (_external_constant, "a weight in another file"),
        (_loop, "functions, loops or sparse weights"),
        (_function, "functions, loops or sparse weights"),
        (_custom_domain, r"node 'mean' \(ReduceMean\) is of the domain 'com.example'"),
        (_future_opset, "an opset other than ONNX's 1 to"),
        (_custom_opset, "an opset other than ONNX's 1 to"),
        (_unknown_operator, "No Op registered for Fortune .* Name: head"),
        (_cycle, "topologically sorted"),
        (_duplicate_name, "two tensors have the same name"),
        (_truncated_weight, "raw_data size .* is too small"),
        (_huge_weight, "raw_data size .* is too small"),
        (_contradicting_shapes, r"node name: head\): .* Incompatible dimensions"),
        (_other_input, r"the one tensor 'pixels' of \(batch, 3, 16, 16\)"),
        (_fixed_batch, "the one tensor 'pixels'"),
        (_other_output, r"the one tensor 'embedding' of \(batch, 6\)"),
        (_no_output, "the one tensor 'embedding'|empty"),
    ],
)
def test_graph_that_no_export_writes_is_rejected(
    tmp_path: Path, damage: Callable[[onnx.ModelProto], None], message: str
) -> None:
    graph = _graph()
    damage(graph)
    path = _write(tmp_path / "onnx", graph)
    with pytest.raises(UserError, match=message) as caught:
        load_graph(load_artifact(path))
    assert str(caught.value).startswith(f"{path}: not a usable onnx (")


def _replace_graph(path: Path, data: bytes) -> None:
    """Replace the bytes of a graph, with the matching checksum."""
    (path / "model.onnx").write_bytes(data)
    card = json.loads((path / "card.json").read_text())
    card["files"]["model.onnx"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "card.json").write_text(json.dumps(card))


def test_bytes_that_are_not_a_graph_are_rejected(tmp_path: Path) -> None:
    path = _write(tmp_path / "onnx", _graph())
    _replace_graph(path, b"\xff" * 200)
    with pytest.raises(UserError, match="not a usable onnx"):
        load_graph(load_artifact(path))


@pytest.mark.parametrize("name", [b"mean", b"weight"])
def test_name_that_is_not_utf8_is_rejected(tmp_path: Path, name: bytes) -> None:
    path = _write(tmp_path / "onnx", _graph())
    _replace_graph(path, (path / "model.onnx").read_bytes().replace(name, b"\x84" + name[1:]))
    with pytest.raises(UserError, match="not a usable onnx .a name in it is not UTF-8 text"):
        load_graph(load_artifact(path))


def test_runtime_errors_become_user_errors() -> None:
    """The runtime checks indices only when the graph runs."""
    graph = _graph()
    gather = helper.make_node("Gather", ["mean", "index"], ["first"], name="gather", axis=1)
    graph.graph.node.insert(1, gather)
    graph.graph.node[2].input[0] = "first"
    graph.graph.initializer.append(numpy_helper.from_array(np.array([0, 1, 9]), "index"))
    onnx.checker.check_model(graph, full_check=True)
    with pytest.raises(UserError, match=r"onnxruntime: cannot run the graph \(.*gather.*\)\. Export the model again\."):
        GraphSession(graph).run([OUTPUT], {INPUT: np.zeros((1, 3, 16, 16), np.float32)})
