from __future__ import annotations

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from export.config import EngineConfig, Int8Config, OnnxConfig
from export.fp16 import to_fp16
from export.int8 import export_int8
from export.qdq import quantised_nodes
from export.tensorrt.bindings import import_tensorrt
from export.tensorrt.build import build_engine, build_plan
from export.tensorrt.compatibility import rebuild_command
from export.to_onnx import export_onnx, load_onnx
from vpr.artifacts.store import load_artifact
from vpr.cli import read_config
from vpr.common.errors import UserError
from vpr.common.gpus import Listing, VisibleGpu

CONFIG = EngineConfig(onnx="", output="", target="sm86")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_demo_graphs_build_without_a_gpu(
    each_student: Path, fp32: Path, ranges: Path, precision: str, tmp_path: Path
) -> None:
    if precision == "fp16":
        graph = export_onnx(OnnxConfig(str(each_student), str(tmp_path / "graph"), precision="fp16"))
    else:
        graph = export_int8(Int8Config(str(fp32), str(ranges), str(tmp_path / "graph")))
    card = load_artifact(build_engine(EngineConfig(onnx=str(graph), output=str(tmp_path / "engine")))).card
    metrics = card.metrics
    assert metrics["precision"] == precision
    assert metrics["targets"] == ["sm86", "sm89", "sm120"]
    assert "profiles" not in metrics
    assert metrics["builder"].startswith("tensorrt-rtx 1.")
    assert metrics["profile"] == [1, 8, 32]
    assert metrics["size_bytes"] == card.files["engine.plan"].size > 10_000
    assert metrics["layers"]["ATTENTION_INPUT"] == 2
    products = len(quantised_nodes(load_onnx(fp32)[0]))
    assert metrics["layers"].get("QUANTIZE", 0) == (products if precision == "int8" else 0)
    assert metrics["precisions"]["HALF"] > 50


def test_opset_20_builds(each_student: Path, tmp_path: Path) -> None:
    from export.to_onnx import trace
    from student.model import load_student

    graph = to_fp16(trace(load_student(each_student)[0], 32, 20))
    plan, layers = build_plan(import_tensorrt("tensorrt-rtx"), "tensorrt-rtx", graph, CONFIG)
    assert len(plan) > 10_000
    assert "SOFTMAX" in layers["layers"]


def test_benchmarked_batch_gets_a_profile_of_its_own(fp32: Path, tmp_path: Path) -> None:
    config = EngineConfig(str(fp32), str(tmp_path / "engine"), "tensorrt-rtx", "sm86", 1, 8, 16, batches=(1, 32))
    card = load_artifact(build_engine(config)).card
    assert card.metrics["profile"] == [1, 8, 16]
    assert card.metrics["profiles"] == [[1, 8, 16], [1, 1, 1], [32, 32, 32]]
    assert card.config["batches"] == [1, 32]
    artifact = load_artifact(tmp_path / "engine")
    assert "--max-batch 16 --batches 1 32" in rebuild_command(artifact)


def test_engine_of_an_older_version_stays_up_to_date(fp32: Path, tmp_path: Path) -> None:
    """Its card has the former option and no batches, as the values of a new one."""
    config = EngineConfig(str(fp32), str(tmp_path / "engine"), "tensorrt-rtx", "sm86")
    card = load_artifact(build_engine(config)).card
    assert card.config["weight_stripped"] is False
    assert "batches" not in card.config
    built = (tmp_path / "engine" / "card.json").stat().st_mtime_ns
    build_engine(config)
    assert (tmp_path / "engine" / "card.json").stat().st_mtime_ns == built


def test_target_outside_the_support_matrix_is_a_warning(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_engine(EngineConfig(str(fp32), str(tmp_path / "engine"), "tensorrt-rtx", "sm80,sm86"))
    assert "warning: engine: TensorRT-RTX builds for sm80, but its support matrix" in capsys.readouterr().err


def test_current_target_is_the_first_gpu(fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card names the architecture, so that another GPU does not take the engine for its own."""
    gpus = [VisibleGpu("NVIDIA Test", capability, 1 << 34, capability) for capability in ("8.9", "8.6")]
    monkeypatch.setattr("export.tensorrt.build.list_gpus", lambda: Listing(tuple(gpus)))
    config = EngineConfig(str(fp32), str(tmp_path / "engine"), "tensorrt-rtx", "current")
    card = load_artifact(build_engine(config)).card
    assert (card.config["target"], card.metrics["targets"]) == ("sm89", ["sm89"])
    gpus.reverse()
    card = load_artifact(build_engine(config)).card
    assert (card.config["target"], card.metrics["targets"]) == ("sm86", ["sm86"])


def test_engine_of_tensorrt_is_built_again_for_another_gpu(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT ignores the target, so the architecture of the GPU takes its place; only the plan is made up here."""
    built: list[str] = []

    def plan(*_: object) -> tuple[bytes, dict[str, object]]:
        built.append("plan")
        return b"plan", {}

    monkeypatch.setattr("export.tensorrt.build.choose_builder", lambda _: "tensorrt")
    monkeypatch.setattr("export.tensorrt.build.import_tensorrt", lambda _: SimpleNamespace(__version__="11.0"))
    monkeypatch.setattr("export.tensorrt.build.build_plan", plan)
    config = EngineConfig(str(fp32), str(tmp_path / "engine"), "tensorrt")
    for architecture in ("sm90", "sm90", "sm89"):
        monkeypatch.setattr("export.tensorrt.build.this_gpu", lambda architecture=architecture: architecture)
        card = load_artifact(build_engine(config)).card
        assert (card.config["target"], card.metrics["targets"]) == (architecture, [architecture])
    assert len(built) == 2


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (
            Listing(problem="has none"),
            "current needs an NVIDIA GPU; this machine has none. Name the architectures, such",
        ),
        (
            Listing((VisibleGpu("NVIDIA H200", "9.0", 1, ""),)),
            r"TensorRT-RTX has no target for NVIDIA H200 \(sm90\)\. Build with --backend tensorrt\.$",
        ),
    ],
)
def test_current_target_without_a_usable_gpu_is_one_line(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: Listing, message: str
) -> None:
    monkeypatch.setattr("export.tensorrt.build.list_gpus", lambda: listing)
    with pytest.raises(UserError, match=f"^target: {message}"):
        build_engine(EngineConfig(str(fp32), str(tmp_path / "engine"), "tensorrt-rtx", "current"))
    assert not list(tmp_path.iterdir())


def test_engine_without_weights_cannot_be_requested() -> None:
    """No runner of the toolkit could use it."""
    with pytest.raises(UserError, match="--weight-stripped: unknown option"):
        read_config(EngineConfig, "export engine", ["--onnx", "a", "--output", "b", "--weight-stripped"])


def test_unknown_operator_is_named(graph: onnx.ModelProto) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(to_fp16(graph))
    victim = next(node for node in broken.graph.node if node.op_type == "Gelu")
    victim.op_type, victim.domain = "Fortune", ""
    with pytest.raises(UserError, match=rf"'{victim.name}' \(Fortune\)"):
        build_plan(import_tensorrt("tensorrt-rtx"), "tensorrt-rtx", broken, CONFIG)


def test_quantised_int32_biases_are_rejected(graph: onnx.ModelProto) -> None:
    """Common quantisers write such biases; our graphs must not contain them."""
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
        ({"target": "sm90"}, "target: expected .*, got 'sm90'"),
        ({"target": ""}, "target: expected .*, got ''"),
        ({"target": "sm86,sm86"}, "target: expected current, or different names .*, got 'sm86,sm86'"),
        ({"target": "current,sm86"}, "target: expected current, or different names .*, got 'current,sm86'"),
        ({"max_batch": 4096}, "max <= 1024, got 1, 8, 4096"),
        ({"batches": (8, 8)}, r"batches: expected different numbers of 1 to 1024, got \[8, 8\]"),
        ({"batches": (0,)}, r"batches: expected different numbers of 1 to 1024, got \[0\]"),
        ({"optimisation_level": 6}, "optimisation_level: "),
        ({"workspace_mb": 0}, "workspace_mb: "),
        ({"min_batch": 8, "opt_batch": 4}, "expected 1 <= min <= opt <= max <= 1024, got 8, 4, 32"),
        ({"backend": "tensorrt"}, r"tensorrt: cannot be loaded .*pip install -r requirements-gpu\.txt.*docs/gpu\.md"),
    ],
)
def test_wrong_value_names_the_key(fp32: Path, changes: dict[str, object], message: str, tmp_path: Path) -> None:
    if changes.get("backend") == "tensorrt" and "tensorrt" in sys.modules:
        pytest.skip("TensorRT is installed")
    with pytest.raises(UserError, match=message):
        build_engine(EngineConfig(**{"onnx": str(fp32), "output": str(tmp_path / "e"), **changes}))
    assert not (tmp_path / "e").exists()


def test_missing_builder_gives_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def import_without_wheel(name: str, *rest: object, **more: object) -> object:
        if name == "onnxruntime_ep_nv_tensorrt_rtx":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    monkeypatch.setattr(builtins, "__import__", import_without_wheel)
    with pytest.raises(UserError, match=r"pip install -r requirements\.txt"):
        import_tensorrt("tensorrt-rtx")


def test_options_reach_the_builder(fp32: Path, ranges: Path, tmp_path: Path) -> None:
    """One MiB of workspace is too little, and a version-compatible engine needs a library that is not installed."""
    graph = str(export_int8(Int8Config(str(fp32), str(ranges), str(tmp_path / "graph"))))
    single = build_engine(
        EngineConfig(graph, str(tmp_path / "single"), target="sm89", optimisation_level=5, workspace_mb=512)
    )
    four = build_engine(EngineConfig(graph, str(tmp_path / "four")))
    sizes = [load_artifact(path).card.metrics["size_bytes"] for path in (single, four)]
    assert sizes[0] < sizes[1]
    assert load_artifact(single).card.config["optimisation_level"] == 5
    for options, message in (
        ({"workspace_mb": 1}, "no tactics .* within workspace limit.*Raise or remove --workspace-mb"),
        ({"version_compatible": True}, "the build failed .*Remove --version-compatible"),
        ({"timing_cache": str(tmp_path / "cache")}, "timing_cache: TensorRT-RTX times no kernels"),
    ):
        with pytest.raises(UserError, match=message):
            build_engine(EngineConfig(graph, str(tmp_path / "none"), backend="tensorrt-rtx", **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "graph", "single"]
