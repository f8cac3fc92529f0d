"""ONNX Runtime sessions by execution provider, and the names of our graphs' ends. Needs neither torch nor onnx."""

from __future__ import annotations

import importlib
from typing import Any

from vpr.common.errors import UserError
from vpr.common.hardware import lacks_vnni

INPUT, OUTPUT = "pixels", "embedding"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
TENSORRT_RTX = "NvTensorRTRTXExecutionProvider"
RTX_WHEEL = "onnxruntime_ep_nv_tensorrt_rtx"


class ProviderMissing(UserError):
    """ONNX Runtime cannot load an execution provider here."""


def open_session(graph: bytes, threads: int = 0, provider: str = CPU, fp8: bool = False) -> Any:
    """An ONNX Runtime session.

    Args:
        graph: serialised ONNX model without external data.
        threads: of an operator on the CPU; 0 is one per core.
        provider: ONNX Runtime's name of what runs it; what that cannot run is left to the CPU.
        fp8: the graph has Q/DQ to FP8 for the CPU, on which ONNX Runtime 1.31 goes wrong: it moves them past a
            Transpose that it does not have for FP8, and drops a Relu before them, as if FP8 began at its zero.

    Raises:
        ProviderMissing: the provider cannot be loaded. ONNX Runtime itself would go on with the CPU.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if lacks_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")  # slower kernels, whose sums are exact
    without = ["ReluQuantRewrite"] if fp8 else []
    if fp8:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if provider == TENSORRT_RTX:
        options.add_provider_for_devices(rtx_devices(), {})
        session = ort.InferenceSession(graph, options)
    else:
        if provider != CPU:
            ort.preload_dlls()  # CUDA's libraries of the wheels that came with torch
        session = ort.InferenceSession(graph, options, providers=[provider], disabled_optimizers=without)
    if provider not in session.get_providers():
        instead = session.get_providers()[0]
        raise ProviderMissing(
            f"onnxruntime: {provider} cannot be loaded ({instead} would run instead): see 'vpr doctor'"
        )
    return session


def rtx_devices() -> list[Any]:
    """The GPUs that TensorRT-RTX's plugin finds; it is registered with ONNX Runtime once.

    Raises:
        ImportError: the plugin's wheel is not installed.
    """
    import onnxruntime as ort

    wheel = importlib.import_module(RTX_WHEEL)
    if not any(device.ep_name == TENSORRT_RTX for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(TENSORRT_RTX, wheel.get_library_path())
    return [device for device in ort.get_ep_devices() if device.ep_name == TENSORRT_RTX]
