from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export.backends.base import RunFailed
from export.backends.openvino_runtime import openvino_forward
from export.backends.pytorch import TorchBackend, compile_by_batch
from export.backends.registry import BACKENDS, BackendUnavailable, choose_backends, models_of
from export.config import BACKEND_NAMES, OnnxConfig
from export.to_onnx import export_onnx
from vpr.common.errors import UserError
from vpr.common.gpus import Listing, VisibleGpu
from vpr.inference import onnx_session as runtime
from vpr.inference.onnx_graph import GraphSession
from vpr.inference.onnx_session import CUDA, TENSORRT_RTX, open_session, rtx_devices, runs_tensorrt_rtx

BY_NAME = {backend.name: backend for backend in BACKENDS}
GPU = ([{"name": "NVIDIA L4", "memory_mib": 23034, "compute_capability": "8.9"}], "580.1")


@pytest.mark.parametrize(
    ("package", "backend"),
    [
        ("torch", "torch"),
        ("torch", "torch-compile-cuda"),
        ("onnxruntime", "onnxruntime-cpu"),
        ("onnxruntime_ep_nv_tensorrt_rtx", "onnxruntime-tensorrt-rtx"),
        ("openvino", "openvino"),
        ("tensorrt_rtx_bindings", "tensorrt-rtx"),
    ],
)
def test_absent_package_is_a_reason(package: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    reason = BY_NAME[backend].missing()
    assert reason is not None
    assert "cannot be loaded" in reason
    assert "pip install -r requirements" in reason


def test_missing_provider_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    build = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"], __version__="1")
    monkeypatch.setitem(sys.modules, "onnxruntime", build)
    reason = BY_NAME["onnxruntime-cuda"].missing()
    assert reason == f"this build of ONNX Runtime has no {CUDA}. Run `pip install -r requirements.txt`."
    assert BY_NAME["onnxruntime-cpu"].missing() is None


def test_missing_package_next_to_a_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.backends.base.read_gpus", lambda: GPU)
    for package in ("pycuda", "pycuda.driver", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, package, None)
    reason = BY_NAME["tensorrt-rtx"].missing()
    assert reason is not None
    assert "pycuda: " in reason
    assert "cuda.bindings: " in reason
    monkeypatch.delitem(sys.modules, "cuda.bindings.driver")
    assert BY_NAME["tensorrt-rtx"].missing() is None
    monkeypatch.setattr("export.backends.onnx_runtime.rtx_devices", list)
    assert BY_NAME["onnxruntime-tensorrt-rtx"].missing() == (
        "TensorRT-RTX finds no GPU that it supports. See `nvidia-smi`."
    )


def test_torch_compile_without_a_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert BY_NAME["torch-compile"].missing() == "needs a C++ compiler. Install g++, or name a compiler in CXX."
    assert BY_NAME["torch"].missing() is None


def set_gpu(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    gpu = VisibleGpu("NVIDIA Test", capability, 1 << 34, "0")
    monkeypatch.setattr("export.backends.base.read_gpus", lambda: GPU)
    monkeypatch.setattr("export.backends.base.list_gpus", lambda: Listing((gpu,), "13.0", "580.1"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.mark.parametrize("name", ["torch-compile-cuda", "torch-compile-cuda-fp16"])
def test_torch_compile_without_a_c_compiler_is_a_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpu(monkeypatch, "9.0")
    assert BY_NAME["torch-cuda"].missing() is None
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert BY_NAME[name].missing() == "needs a C compiler. Install gcc, or name a compiler in CC."
    assert BY_NAME["torch-cuda"].missing() is None
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    assert BY_NAME[name].missing() == "needs Python.h. Install the package python3-dev of this Python version."


@pytest.mark.parametrize(("capability", "is_missing"), [("7.5", True), ("8.0", False), ("12.0", False)])
@pytest.mark.parametrize("dtype", ["tf32", "bf16"])
def test_precision_that_the_gpu_does_not_multiply_is_a_reason(
    dtype: str, capability: str, is_missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gpu(monkeypatch, capability)
    reason = BY_NAME[f"torch-cuda-{dtype}"].missing()
    assert (reason is not None) == is_missing
    assert reason is None or f"compute capability 8.0 or newer for {dtype}" in reason
    assert BY_NAME["torch-cuda-fp16"].missing() is None


def test_driver_too_old_for_pytorch_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = Listing((VisibleGpu("NVIDIA L4", "8.9", 1, "0"),), "12.4", "550.54")
    monkeypatch.setattr("export.backends.base.read_gpus", lambda: GPU)
    monkeypatch.setattr("export.backends.pytorch.list_gpus", lambda: listing)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    problem = "PyTorch is built for CUDA 13.0, and the driver 550.54 supports CUDA 12.4. Update the driver."
    assert BY_NAME["torch-cuda"].missing() == problem
    monkeypatch.setattr("torch.version.cuda", None)
    assert BY_NAME["torch-cuda"].missing() == "this PyTorch has no CUDA. Install its CUDA build."


@pytest.mark.parametrize(("dtype", "difference"), [("bf16", 3e-2), ("fp16", 5e-3)])
def test_half_precision_embeds_nearly_as_float32(
    each_student: Path, dtype: Any, difference: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = models_of(each_student)
    pixels, expected = model.random_input(3), model.open(1)(model.random_input(3))
    half = TorchBackend("half", "cpu", compiled=False, dtype=dtype)
    embeddings = half.open(model.artifact, 1)(pixels)
    assert embeddings.dtype == np.float32
    assert 1e-5 < np.abs(embeddings - expected).max() < difference
    assert half.precision(model.artifact) == dtype


def test_each_batch_size_is_compiled_alone_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that is compiled for two sizes switches to dynamic shapes and loses its CUDA graphs."""
    compiled: list[dict[str, Any]] = []

    def compile_network(network: Any, **options: Any) -> Any:
        compiled.append(options)
        number = len(compiled)
        return lambda pixels: (number, network(pixels))

    monkeypatch.setattr(torch, "compile", compile_network)
    run = compile_by_batch(lambda pixels: 2 * pixels, "cuda")
    for batch, variant in ((1, 1), (8, 2), (1, 1), (32, 3), (8, 2)):
        number, result = run(torch.ones(batch))
        assert (number, len(result)) == (variant, batch)
    assert compiled == [{"mode": "reduce-overhead", "dynamic": False}] * 3


def test_failing_network_names_backend_and_artifact(student_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = models_of(student_artifact, ["torch"])

    def fail(pixels: Any) -> None:
        raise RuntimeError("BackendCompilerFailed:\n  Cannot find a working triton installation")

    monkeypatch.setattr(TorchBackend, "load", lambda self, artifact: fail)
    pattern = (
        r"student: torch cannot run it \(BackendCompilerFailed: Cannot find .* installation\)\. See `vpr doctor`\."
    )
    with pytest.raises(RunFailed, match=pattern):
        model.open(1)(model.random_input(1))


def test_tensorrt_provider_needs_the_libraries_that_its_file_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lists the provider as available, also next to TensorRT 11, whose libraries it cannot use."""
    set_gpu(monkeypatch, "9.0")
    assert "TensorrtExecutionProvider" in pytest.importorskip("onnxruntime").get_available_providers()
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    reason = BY_NAME["onnxruntime-tensorrt"].missing()
    assert reason is not None
    assert re.match(r"libnvinfer\.so\.\d+ cannot be loaded; ONNX Runtime .* is built for it\.", reason)
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: None)
    assert BY_NAME["onnxruntime-tensorrt"].missing() is None


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0", "12.1", "13.0"])
def test_rtx_provider_runs_on_the_gpus_of_its_header(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx")
    header = Path(wheel.__file__).with_name("tensorrt_rtx_provider_options.h").read_text(encoding="utf-8")
    targets = re.search(r"kTargetSMValues\[\] = \{(.*?)\}", header)
    assert targets is not None
    assert "compute_capability >= 120" in header
    number = int(capability.replace(".", ""))
    is_supported = number >= 120 or f'"sm{number}"' in targets.group(1)
    assert runs_tensorrt_rtx(capability) == is_supported
    set_gpu(monkeypatch, capability)
    monkeypatch.setattr("export.backends.onnx_runtime.rtx_devices", lambda: [1])
    reason = BY_NAME["onnxruntime-tensorrt-rtx"].missing()
    assert (reason is None) == is_supported
    assert reason is None or f"this GPU is NVIDIA Test ({capability}). Use onnxruntime-cuda or tensorrt." in reason


def test_rtx_provider_gets_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [SimpleNamespace(ep_name=TENSORRT_RTX, number=number) for number in range(3)]
    given: list[Any] = []
    _runtime(monkeypatch, devices, given)
    monkeypatch.setattr(_Session, "get_providers", lambda self: [TENSORRT_RTX])
    open_session(b"", provider=TENSORRT_RTX)
    assert given == devices[:1]


def test_graph_that_a_provider_rejects_is_a_reason(
    student_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 Q/DQ, for example, which ONNX Runtime's CUDA provider does not implement."""
    fp32 = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp32"), images=2))
    (model,) = models_of(fp32, ["onnxruntime-cuda"])
    monkeypatch.setattr("export.backends.onnx_runtime.OnnxRuntimeBackend.missing", lambda self: None)

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("NOT_IMPLEMENTED : Could not find an implementation for QuantizeLinear(23)")

    monkeypatch.setattr("vpr.inference.onnx_graph.open_session", refuse)
    with pytest.raises(BackendUnavailable, match=r"fp32: onnxruntime: cannot run the graph \(.*QuantizeLinear"):
        model.open(1)
    (on_cpu,) = models_of(fp32, ["openvino"])
    monkeypatch.setattr("openvino.Core", refuse)
    with pytest.raises(BackendUnavailable, match=r"fp32: .*openvino: cannot run the graph \(.*QuantizeLinear"):
        on_cpu.open(1)
    (fp32 / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model\.onnx"):
        models_of(fp32, ["onnxruntime-cuda"])


class _Session:
    """A session that fell back to the CPU provider."""

    def __init__(self, graph: bytes, options: object, providers: list[str] | None = None, **others: object) -> None:
        self.providers = providers

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def _runtime(
    monkeypatch: pytest.MonkeyPatch, devices: list[SimpleNamespace], given: list[Any] | None = None
) -> list[str]:
    given = [] if given is None else given
    registered: list[str] = []
    runtime = ModuleType("onnxruntime")
    options = SimpleNamespace(
        add_provider_for_devices=lambda devices, settings: given.extend(devices),
        add_session_config_entry=lambda key, value: registered.append(key),
    )
    vars(runtime).update(
        SessionOptions=lambda: options,
        InferenceSession=_Session,
        preload_dlls=lambda: None,
        get_ep_devices=lambda: devices if registered else [],
        register_execution_provider_library=lambda name, path: registered.append(path),
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    wheel = SimpleNamespace(get_library_path=lambda: "plugin.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", wheel)
    return registered


@pytest.mark.parametrize("provider", [CUDA, TENSORRT_RTX])
def test_cpu_fallback_of_gpu_provider_is_an_error(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _runtime(monkeypatch, [])
    with pytest.raises(UserError, match=rf"{provider} cannot be loaded"):
        open_session(b"", provider=provider)


@pytest.mark.parametrize("overflow", [False, True])
def test_exact_sums_are_requested_without_vnni(overflow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = _runtime(monkeypatch, [])
    monkeypatch.setattr(runtime, "lacks_vnni", lambda: overflow)
    open_session(b"")
    assert entries == ["session.x64quantprecision"] * overflow


def test_plugin_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rtx, cpu = SimpleNamespace(ep_name=TENSORRT_RTX), SimpleNamespace(ep_name="CPUExecutionProvider")
    registered = _runtime(monkeypatch, [cpu, rtx])
    assert rtx_devices() == rtx_devices() == [rtx]
    assert registered == ["plugin.so"]


def test_models_of_lists_every_backend(student_artifact: Path, tmp_path: Path) -> None:
    assert [model.backend for model in models_of(student_artifact, ["all"])] == [
        "torch",
        "torch-compile",
        *("torch-cuda", "torch-cuda-tf32", "torch-cuda-bf16", "torch-cuda-fp16"),
        *("torch-compile-cuda", "torch-compile-cuda-tf32", "torch-compile-cuda-bf16", "torch-compile-cuda-fp16"),
    ]
    fp32 = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp32"), images=2))
    assert [model.backend for model in models_of(fp32)] == ["onnxruntime-cpu", "openvino"]
    on_cuda = models_of(fp32, ["onnxruntime-cuda"])[0]
    assert on_cuda.name == "fp32 (onnxruntime-cuda)"
    assert on_cuda.precision == "fp32"
    if reason := on_cuda.runner.missing():
        with pytest.raises(BackendUnavailable, match=reason):
            on_cuda.open(1)


def test_openvino_computes_floats_in_fp32(graph: onnx.ModelProto) -> None:
    """OpenVINO would use BF16 on processors that have it, with errors of 1e-3."""
    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(openvino_forward(graph)(pixels), GraphSession(graph).embed(pixels), atol=2e-6)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(UserError, match="unknown backend 'tensorflow'. Choose from all, torch, "):
        choose_backends(["torch", "tensorflow"])
    assert [backend.name for backend in choose_backends(["all"])] == list(BACKEND_NAMES)


@pytest.mark.slow
def test_torch_compile_equals_torch(student_artifact: Path) -> None:
    eager, compiled = (models_of(student_artifact, [name])[0] for name in ("torch", "torch-compile"))
    pixels = eager.random_input(3)
    np.testing.assert_allclose(compiled.open(1)(pixels), eager.open(1)(pixels), atol=2e-5)
