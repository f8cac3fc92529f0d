from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from export.backends.registry import BACKENDS, BackendUnavailable, choose_backends, models_of
from export.config import BACKEND_NAMES, OnnxConfig
from export.to_onnx import export_onnx
from vpr.common.errors import UserError
from vpr.inference import onnx_session as runtime
from vpr.inference.onnx_session import CUDA, TENSORRT_RTX, open_session, rtx_devices

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
    monkeypatch.setitem(sys.modules, "pycuda", None)
    reason = BY_NAME["tensorrt-rtx"].missing()
    assert reason is not None
    assert "pycuda" in reason
    assert "requirements-gpu.txt" in reason
    monkeypatch.setattr("export.backends.onnx_runtime.rtx_devices", list)
    assert BY_NAME["onnxruntime-tensorrt-rtx"].missing() == (
        "TensorRT-RTX finds no GPU that it supports. See `nvidia-smi`."
    )


def test_torch_compile_without_a_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert BY_NAME["torch-compile"].missing() == "needs a C++ compiler. Install g++, or name a compiler in CXX."
    assert BY_NAME["torch"].missing() is None


class _Session:
    """A session that fell back to the CPU provider."""

    def __init__(self, graph: bytes, options: object, providers: list[str] | None = None, **others: object) -> None:
        self.providers = providers

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def _runtime(monkeypatch: pytest.MonkeyPatch, devices: list[SimpleNamespace]) -> list[str]:
    registered: list[str] = []
    runtime = ModuleType("onnxruntime")
    options = SimpleNamespace(
        add_provider_for_devices=lambda devices, settings: None,
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
        "torch-cuda",
        "torch-compile-cuda",
    ]
    fp32 = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp32"), images=2))
    assert [model.backend for model in models_of(fp32)] == ["onnxruntime-cpu", "openvino"]
    on_cuda = models_of(fp32, ["onnxruntime-cuda"])[0]
    assert on_cuda.name == "fp32 (onnxruntime-cuda)"
    assert on_cuda.precision == "fp32"
    if reason := on_cuda.runner.missing():
        with pytest.raises(BackendUnavailable, match=reason):
            on_cuda.open(1)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(UserError, match="unknown backend 'tensorflow'. Choose from all, torch, "):
        choose_backends(["torch", "tensorflow"])
    assert [backend.name for backend in choose_backends(["all"])] == list(BACKEND_NAMES)


@pytest.mark.slow
def test_torch_compile_equals_torch(student_artifact: Path) -> None:
    eager, compiled = (models_of(student_artifact, [name])[0] for name in ("torch", "torch-compile"))
    pixels = eager.random_input(3)
    np.testing.assert_allclose(compiled.open(1)(pixels), eager.open(1)(pixels), atol=2e-5)
