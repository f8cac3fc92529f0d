"""Python modules of TensorRT and TensorRT-RTX: choice, import, target GPU and error log."""

import ctypes
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from vpr.common.errors import UserError
from vpr.common.gpus import list_gpus
from vpr.inference.onnx_session import RTX_WHEEL

Builder = Literal["tensorrt", "tensorrt-rtx"]
_RTX_LIBRARIES = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
_INSTALL = {
    "tensorrt-rtx": "Run `pip install -r requirements.txt`.",
    "tensorrt": "Run `pip install -r requirements-gpu.txt`, see docs/gpu.md.",
}


def choose_builder(backend: Literal["auto", "tensorrt", "tensorrt-rtx"]) -> Builder:
    """Resolve ``auto`` to TensorRT if it imports, else to TensorRT-RTX."""
    if backend != "auto":
        return backend
    try:
        importlib.import_module("tensorrt")
    except ImportError:
        return "tensorrt-rtx"
    return "tensorrt"


def import_tensorrt(backend: Builder) -> ModuleType:
    """Import the Python module of a builder.

    TensorRT-RTX's bindings contain no libraries. ONNX Runtime's provider wheel contains them, and importing that
    wheel creates the links that the loader needs. :class:`UserError` with the command that installs a missing builder.
    """
    try:
        if backend == "tensorrt":
            return importlib.import_module("tensorrt")
        wheel = importlib.import_module(RTX_WHEEL)
        folder = Path(str(wheel.__file__)).parent
        for name in _RTX_LIBRARIES:
            ctypes.CDLL(str(next(folder.rglob(name))), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module("tensorrt_rtx_bindings")
    except (ImportError, OSError, StopIteration) as error:
        raise UserError(f"{backend}: cannot be loaded ({error}). {_INSTALL[backend]}") from None


def this_gpu() -> str:
    """Return the architecture of the GPU that TensorRT builds for, or ``this GPU`` if it is unknown.

    TensorRT uses the first GPU that CUDA lists, which ``--device`` and ``CUDA_VISIBLE_DEVICES`` choose.
    """
    gpu = next(iter(list_gpus().gpus), None)
    return gpu.architecture if gpu else "this GPU"


def error_logger(trt: ModuleType, errors: list[str]) -> Any:
    """Return a logger that appends TensorRT's errors to a list."""

    class ErrorLogger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Collect errors; ignore warnings and progress."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Append an error. TensorRT calls this from any of its threads."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(message)

    return ErrorLogger()
