"""The CUDA driver calls that an engine needs, by PyCUDA where it is installed, else by ``cuda-bindings``.

PyCUDA aborts the process if a thread ends with a context on its stack, and it frees memory only while a context
is current. So the context is current only inside ``with driver.current()``, and every other call happens there.
"""

import ctypes
import importlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError

FLOAT32 = np.dtype(np.float32)
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: work on the legacy default stream neither blocks nor breaks a capture
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
_INSTALL = "Run `pip install -r requirements.txt`; its torch installs cuda-bindings."


class DriverError(Exception):
    """A call of CUDA or TensorRT failed. The message names it."""


@dataclass(frozen=True)
class Gpu:
    """Name and architecture (as ``sm89``) of a GPU."""

    name: str
    architecture: str


class Stream(Protocol):
    """A stream: work on it runs in order."""

    @property
    def handle(self) -> int:
        """Address of the driver's ``CUstream``."""


class CudaDriver(Protocol):
    """One GPU, in the primary context that other libraries of the process share.

    Call every method except ``current`` inside ``with driver.current()``. That block raises :class:`MemoryError`
    if the GPU has too little memory, and :class:`DriverError` for every other failure.
    """

    gpu: Gpu
    cuda: str  # version that the driver supports, as ``CUDA 13.0``
    device: int  # index in CUDA's order

    def current(self) -> AbstractContextManager[None]:
        """Make the GPU current in the calling thread for the length of the block."""

    def stream(self) -> Any:
        """Create a :class:`Stream`."""

    def event(self) -> Any:
        """Create an event: a point in the work of a stream."""

    def record(self, event: Any, stream: Any) -> None:
        """Put an event after the work of a stream."""

    def wait(self, stream: Any, event: Any) -> None:
        """Let the later work of a stream wait for an event. The host does not wait."""

    def wait_on_host(self, event: Any) -> None:
        """Wait until an event is reached."""

    def milliseconds(self, start: Any, end: Any) -> float:
        """Return the GPU's time between two reached events."""

    def destroy(self, stream_or_event: Any) -> None:
        """Destroy a stream that has finished its work, or an event."""

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any] = FLOAT32) -> NDArray[Any]:
        """Allocate page-locked host memory."""

    def allocate(self, size: int) -> Any:
        """Allocate ``size`` bytes of device memory; ``int()`` of the result is the address."""

    def free(self, memory: Any) -> None:
        """Free memory of ``pinned`` or ``allocate``."""

    def memory(self) -> tuple[int, int]:
        """Return the free and all bytes of the GPU's memory."""

    def copy_in(self, device: int, host: NDArray[Any], stream: Any) -> None:
        """Copy a contiguous array to a device address asynchronously."""

    def copy_out(self, host: NDArray[np.float32], device: int, stream: Any) -> None:
        """Copy from a device address into page-locked memory asynchronously."""

    def copy_on_device(self, target: int, source: int, size: int, stream: Any) -> None:
        """Copy ``size`` bytes from one device address to another asynchronously."""

    def synchronise(self, stream: Any) -> None:
        """Wait until a stream has finished its work."""

    def capture(self, stream: Any, enqueue: Callable[[], bool]) -> int:
        """Capture the work that ``enqueue`` puts on a stream as a CUDA graph, without running it."""

    def launch(self, graph: int, stream: Any) -> None:
        """Enqueue a graph on a stream."""

    def discard(self, graph: int) -> None:
        """Destroy a graph."""


_drivers: dict[int, CudaDriver] = {}
_lock = threading.Lock()


def open_driver(device: int = 0) -> CudaDriver:
    """Return the driver of a GPU, by its index in CUDA's order. There is one per GPU, for the life of the process.

    Raises:
        UserError: Neither PyCUDA nor cuda-bindings can be loaded, there is no such GPU, or CUDA cannot use it.
    """
    with _lock:
        if device not in _drivers:
            _drivers[device] = _create_driver(device)
        return _drivers[device]


def missing_driver() -> str | None:
    """Return why neither PyCUDA nor cuda-bindings can be loaded, and the remedy; None if one of them can."""
    reasons = []
    for package in ("pycuda.driver", "cuda.bindings.driver"):
        try:
            importlib.import_module(package)
        except (ImportError, OSError) as error:
            reasons.append(f"{package.rpartition('.')[0]}: {' '.join(str(error).split())}")
        else:
            return None
    return f"cannot load a CUDA driver package ({'; '.join(reasons)}). {_INSTALL}"


def _create_driver(device: int) -> CudaDriver:
    if reason := missing_driver():
        raise UserError(f"cuda: {reason}")
    try:
        importlib.import_module("pycuda.driver")
    except (ImportError, OSError):
        from export.tensorrt.cuda_bindings_driver import CudaBindingsDriver

        return CudaBindingsDriver(device)
    from export.tensorrt.pycuda_driver import PyCudaDriver

    return PyCudaDriver(device)


def check_device(device: int, count: int) -> None:
    """Raise :class:`UserError` unless a GPU of this index exists."""
    if not 0 <= device < count:
        raise UserError(f"device: expected 0 to {count - 1} on this machine, got {device}.")


def cuda_version(version: int) -> str:
    """Return the text of a driver's version number: ``CUDA 12.4`` for 12040."""
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def explain_unusable(device: int, error: object) -> UserError:
    """Return the error for a GPU that CUDA cannot use."""
    return UserError(f"device: CUDA cannot use GPU {device} ({error}). Check `nvidia-smi`.")


class GraphCalls:
    """CUDA graphs through the driver API of the loaded ``libcuda.so.1``, which PyCUDA 2026.1 does not wrap."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def capture(self, stream: int, enqueue: Callable[[], bool]) -> int:
        """Capture what ``enqueue`` puts on a stream, as a graph's handle; :class:`DriverError` if that fails."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _THREAD_LOCAL)
        is_enqueued = False
        try:
            is_enqueued = enqueue()
        finally:
            # A stream that stays in capture mode runs no further work.
            status = self._library.cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
        if not is_enqueued:
            raise DriverError("the engine cannot be captured")
        self._check("cuStreamEndCapture", status)
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)
        return int(executable.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a graph on a stream."""
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def discard(self, graph: int) -> None:
        """Destroy a graph."""
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(result, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'error').decode()} ({result})")


class GraphMethods:
    """The methods of a :class:`CudaDriver` for CUDA graphs, which both drivers share."""

    _graphs: GraphCalls

    def capture(self, stream: Stream, enqueue: Callable[[], bool]) -> int:
        """See :class:`CudaDriver`."""
        return self._graphs.capture(stream.handle, enqueue)

    def launch(self, graph: int, stream: Stream) -> None:
        """See :class:`CudaDriver`."""
        self._graphs.launch(graph, stream.handle)

    def discard(self, graph: int) -> None:
        """See :class:`CudaDriver`."""
        self._graphs.discard(graph)
