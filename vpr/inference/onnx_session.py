"""ONNX Runtime sessions by execution provider, and names of a graph's input and output. Imports no torch or onnx."""

import ctypes
import importlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vpr.common.errors import UserError
from vpr.common.hardware import lacks_vnni
from vpr.common.telemetry import disable_telemetry

INPUT, OUTPUT = "pixels", "embedding"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
TENSORRT_RTX = "NvTensorRTRTXExecutionProvider"
RTX_WHEEL = "onnxruntime_ep_nv_tensorrt_rtx"


class ProviderMissing(UserError):
    """ONNX Runtime cannot load an execution provider here."""


def import_onnxruntime() -> Any:
    """Import and return ONNX Runtime without its telemetry."""
    disable_telemetry()
    return importlib.import_module("onnxruntime")


def open_session(
    graph: bytes,
    threads: int = 0,
    provider: str = CPU,
    fp8: bool = False,
    weights: Mapping[str, Any] | None = None,
) -> Any:
    """Open an ONNX Runtime session of a serialised model; ``weights`` are arrays that it names and does not contain.

    With 0 ``threads`` an operator uses one CPU thread per core. ``fp8`` (a graph with FP8 Q/DQ on the CPU) disables two
    wrong optimisations of ONNX Runtime 1.31: moving Q/DQ past a Transpose that lacks FP8, dropping a Relu before it.

    Raises:
        ProviderMissing: The provider cannot be loaded. ONNX Runtime would silently use the CPU.
    """
    ort = import_onnxruntime()

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if lacks_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")  # slower kernels with exact sums
    add_weights(options, weights or {})
    disabled = ["ReluQuantRewrite"] if fp8 else []
    if fp8:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if provider == TENSORRT_RTX:
        options.add_provider_for_devices(rtx_devices()[:1], {})  # the provider rejects a list of several GPUs
        session = ort.InferenceSession(graph, options)
    else:
        if provider != CPU:
            ort.preload_dlls()  # CUDA libraries from the wheels that torch installs
        if provider == TENSORRT:
            load_tensorrt_libraries()
        session = ort.InferenceSession(graph, options, providers=[provider], disabled_optimizers=disabled)
    if provider not in session.get_providers():
        fallback = session.get_providers()[0]
        raise ProviderMissing(f"onnxruntime: {provider} cannot be loaded ({fallback} would run). See `vpr doctor`.")
    return session


def add_weights(options: Any, weights: Mapping[str, Any]) -> None:
    """Give a session's options the arrays that its graph names and does not contain; they must outlive the session."""
    ort = import_onnxruntime()

    if weights:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        options.add_external_initializers(list(weights), values)


def rtx_devices() -> list[Any]:
    """Return the GPUs of the TensorRT-RTX plugin, registered on the first call; raise ImportError without its wheel."""
    ort = import_onnxruntime()

    wheel = importlib.import_module(RTX_WHEEL)
    if not any(device.ep_name == TENSORRT_RTX for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(TENSORRT_RTX, wheel.get_library_path())
    return [device for device in ort.get_ep_devices() if device.ep_name == TENSORRT_RTX]


def runs_tensorrt_rtx(compute_capability: str) -> bool:
    """Return whether the TensorRT-RTX plugin runs on a GPU of this compute capability, such as ``8.9``.

    ``IsComputeCapabilitySupported`` in the wheel's ``tensorrt_rtx_provider_options.h``: an A100 (8.0) or H100 (9.0) is
    not supported.
    """
    major, minor = map(int, compute_capability.split("."))
    return (major, minor) in ((8, 6), (8, 9)) or major >= 12


def missing_tensorrt_library() -> str | None:
    """Return the first library of TensorRT that ONNX Runtime's provider needs and cannot load, or None.

    The provider is bound to one major version of TensorRT, whose libraries its file names. ONNX Runtime lists the
    provider as available without looking for them.
    """
    load_tensorrt_libraries()
    folder = Path(str(import_onnxruntime().__file__)).parent / "capi"
    file = folder / "libonnxruntime_providers_tensorrt.so"
    needed = re.findall(rb"libnv(?:infer|onnxparser)\.so\.\d+", file.read_bytes()) if file.is_file() else []
    for name in sorted({library.decode() for library in needed}):
        try:
            ctypes.CDLL(name)
        except OSError:
            return name
    return None


def load_tensorrt_libraries() -> None:
    """Load the libraries of the ``tensorrt`` wheel, if it is installed: they are in no folder that the loader knows."""
    with suppress(ImportError, OSError):
        importlib.import_module("tensorrt")
