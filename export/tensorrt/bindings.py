"""TensorRT and TensorRT-RTX as Python modules: which is there, for which GPU, and what they log.

Building an engine and running one both begin here.
"""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from vpr.common.errors import UserError
from vpr.common.hardware import read_gpus
from vpr.inference.onnx_session import RTX_WHEEL

Backend = Literal["tensorrt", "tensorrt-rtx"]
_RTX_LIBRARIES = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
_REMEDY = {
    "tensorrt-rtx": "pip install -r requirements.txt",
    "tensorrt": "pip install -r requirements-gpu.txt, on a machine with an NVIDIA GPU",
}


def choose_backend(wanted: Literal["auto", "tensorrt", "tensorrt-rtx"]) -> Backend:
    """``auto`` is TensorRT where it imports, else TensorRT-RTX."""
    if wanted != "auto":
        return wanted
    try:
        importlib.import_module("tensorrt")
    except ImportError:
        return "tensorrt-rtx"
    return "tensorrt"


def import_tensorrt(backend: Backend) -> ModuleType:
    """The builder's Python module.

    TensorRT-RTX's bindings carry no libraries; those lie in ONNX Runtime's provider wheel, whose import
    makes the links that the loader asks for.

    Raises:
        UserError: it is not installed, with the line that installs it.
    """
    try:
        if backend == "tensorrt":
            return importlib.import_module("tensorrt")
        carrier = importlib.import_module(RTX_WHEEL)
        folder = Path(str(carrier.__file__)).parent
        for name in _RTX_LIBRARIES:
            ctypes.CDLL(str(next(folder.rglob(name))), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module("tensorrt_rtx_bindings")
    except (ImportError, OSError, StopIteration) as error:
        raise UserError(f"{backend}: cannot be loaded ({error}): {_REMEDY[backend]}") from None


def this_gpu() -> str:
    """Architecture of the GPU that TensorRT builds for, where all of the machine are alike."""
    found = {str(gpu["compute_capability"]).replace(".", "") for gpu in read_gpus()[0]}
    return f"sm{found.pop()}" if len(found) == 1 else "this GPU"


def error_logger(trt: ModuleType, errors: list[str]) -> Any:
    """A logger that appends TensorRT's errors to a list."""

    class Collector(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors for the message; everything else is the builder's own business."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Called by the builder, from any of its threads."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(message)

    return Collector()
