from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from export.config import EngineConfig, Int8Config, OnnxConfig
from export.fp16 import to_fp16
from export.int8 import export_int8
from export.qdq import quantised_nodes
from export.tensorrt.bindings import import_tensorrt
from export.tensorrt.build import build_engine, build_plan
from export.tensorrt.inspector import summarise_inspection
from export.to_onnx import export_onnx, load_onnx
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError

CONFIG = EngineConfig(onnx="", output="", target="sm86")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_graph_of_the_demo_builds_without_a_gpu(
    each_student: Path, fp32: Path, ranges: Path, precision: str, tmp_path: Path
) -> None:
    if precision == "fp16":
        graph = export_onnx(OnnxConfig(str(each_student), str(tmp_path / "graph"), precision="fp16"))
    else:
        graph = export_int8(Int8Config(str(fp32), str(ranges), str(tmp_path / "graph")))
    card = load_artifact(build_engine(EngineConfig(onnx=str(graph), output=str(tmp_path / "engine")))).card
    metrics = card.metrics
    assert metrics["precision"] == precision
    assert metrics["targets"] == ["sm80", "sm86", "sm89", "sm120"]
    assert metrics["builder"].startswith("tensorrt-rtx 1.")
    assert metrics["profile"] == [1, 8, 32]
    assert metrics["size_bytes"] == card.files["engine.plan"].size > 10_000
    assert metrics["layers"]["ATTENTION_INPUT"] == 2
    products = len(quantised_nodes(load_onnx(fp32)[0]))
    assert metrics["layers"].get("QUANTIZE", 0) == (products if precision == "int8" else 0)
    assert metrics["precisions"]["HALF"] > 50


def test_opset_20_builds_too(each_student: Path, tmp_path: Path) -> None:
    from export.to_onnx import trace
    from student.model import load_student

    graph = to_fp16(trace(load_student(each_student)[0], 32, 20))
    plan, layers = build_plan(import_tensorrt("tensorrt-rtx"), "tensorrt-rtx", graph, CONFIG)
    assert len(plan) > 10_000
    assert "SOFTMAX" in layers["layers"]


def test_a_graph_the_parser_does_not_know_is_refused_by_name(graph: onnx.ModelProto) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(to_fp16(graph))
    victim = next(node for node in broken.graph.node if node.op_type == "Gelu")
    victim.op_type, victim.domain = "Fortune", ""
    with pytest.raises(UserError, match=rf"'{victim.name}' \(Fortune\)"):
        build_plan(import_tensorrt("tensorrt-rtx"), "tensorrt-rtx", broken, CONFIG)


def test_quantised_int32_biases_are_refused(graph: onnx.ModelProto) -> None:
    """The fault of common quantisers that our graphs must never have."""
    broken = onnx.ModelProto()
    broken.CopyFrom(to_fp16(graph))
    add = next(node for node in broken.graph.node if node.name.endswith("to_out.0/Add"))
    bias = next(i for i, name in enumerate(add.input) if any(t.name == name for t in broken.graph.initializer))
    width = next(t for t in broken.graph.initializer if t.name == add.input[bias]).dims[0]
    broken.graph.initializer.extend(
        [
            helper.make_tensor("bias_int32", TensorProto.INT32, [width], [1] * width),
            helper.make_tensor("bias_scale", TensorProto.FLOAT16, [], [1.0]),
            helper.make_tensor("bias_zero", TensorProto.INT32, [], [0]),
        ]
    )
    inputs = ["bias_int32", "bias_scale", "bias_zero"]
    broken.graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, ["bias_dq"], name="bias/DQ"))
    add.input[bias] = "bias_dq"
    with pytest.raises(UserError, match="bias/DQ"):
        build_plan(import_tensorrt("tensorrt-rtx"), "tensorrt-rtx", broken, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "sm90"}, "target: sm90: choose from"),
        ({"target": ""}, "target: none"),
        ({"target": "sm86,sm86"}, "target: none, or one twice"),
        ({"max_batch": 4096}, "at most 1024"),
        ({"optimisation_level": 6}, "optimisation_level: 6: give 0"),
        ({"workspace_mb": 0}, "workspace_mb: 0: give 1"),
        ({"min_batch": 8, "opt_batch": 4}, "must rise"),
        ({"backend": "tensorrt"}, r"tensorrt: cannot be loaded .* pip install -r requirements-gpu\.txt"),
    ],
)
def test_wrong_choices_name_the_key(fp32: Path, changes: dict[str, object], message: str, tmp_path: Path) -> None:
    if changes.get("backend") == "tensorrt" and "tensorrt" in sys.modules:
        pytest.skip("TensorRT is installed")
    with pytest.raises(UserError, match=message):
        build_engine(EngineConfig(**{"onnx": str(fp32), "output": str(tmp_path / "e"), **changes}))
    assert not (tmp_path / "e").exists()


def test_a_missing_builder_names_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "onnxruntime_ep_nv_tensorrt_rtx":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install -r requirements\.txt"):
        import_tensorrt("tensorrt-rtx")


def test_each_option_reaches_the_builder(fp32: Path, ranges: Path, tmp_path: Path) -> None:
    """A megabyte of workspace is too little, a version-compatible engine needs a library that is not here."""
    graph = str(export_int8(Int8Config(str(fp32), str(ranges), str(tmp_path / "graph"))))
    one = build_engine(
        EngineConfig(graph, str(tmp_path / "one"), target="sm89", optimisation_level=5, workspace_mb=512)
    )
    four = build_engine(EngineConfig(graph, str(tmp_path / "four")))
    sizes = [load_artifact(path).card.metrics["size_bytes"] for path in (one, four)]
    assert sizes[0] < sizes[1]
    assert load_artifact(one).card.config["optimisation_level"] == 5
    for options, message in (
        ({"workspace_mb": 1}, "no tactics .* within workspace limit.*: raise --workspace-mb"),
        ({"version_compatible": True}, "the build failed: .*: leave --version-compatible"),
        ({"weight_stripped": True}, "the build failed: .*: leave --version-compatible and --weight-stripped"),
        ({"timing_cache": str(tmp_path / "cache")}, "timing_cache: TensorRT-RTX measures nothing"),
    ):
        with pytest.raises(UserError, match=message):
            build_engine(EngineConfig(graph, str(tmp_path / "none"), backend="tensorrt-rtx", **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "graph", "one"]


def test_the_inspector_s_layers_are_counted() -> None:
    """In the form that TensorRT's documentation of ``IEngineInspector`` shows."""
    found = {
        "Layers": [
            {"Name": "conv", "LayerType": "CaskConvolution", "Outputs": [{"Format/Datatype": "Half"}]},
            {"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", "Outputs": [{"Format/Datatype": "Half"}]},
            {"Name": "_gemm_mha_v2_myl0_9", "LayerType": "kgen", "Outputs": [{"Format/Datatype": "Int8"}]},
            "a layer of little verbosity",
        ]
    }
    assert summarise_inspection(json.dumps(found)) == {
        "layers": {"CaskConvolution": 1, "Myelin": 1, "kgen": 1},
        "formats": {"Half": 2, "Int8": 1},
        "fused_attention": 1,
    }
