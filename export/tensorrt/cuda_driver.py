"""The CUDA driver calls that an engine needs, by PyCUDA.

PyCUDA aborts the process if a thread ends with a context on its stack, and it frees memory only while a context
is current. So the context is current only inside ``with driver.current()``, and every other call happens there.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: work on the legacy default stream neither blocks nor breaks a capture
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
_INSTALL = "Run `pip install -r requirements-gpu.txt` on a machine with an NVIDIA GPU."


class DriverError(Exception):
    """A call of CUDA or TensorRT failed. The message names it."""


@dataclass(frozen=True)
class Gpu:
    """Name and architecture (as ``sm89``) of a GPU."""

    name: str
    architecture: str


class PyCudaDriver:
    """One GPU, by its index in CUDA's order, in the primary context that other libraries of the process share.

    Call every method except ``current`` inside ``with driver.current()``. That block raises :class:`MemoryError`
    if the GPU has too little memory, and :class:`DriverError` for every other failure. :class:`UserError` if PyCUDA is
    not installed, the GPU does not exist, or it has no driver.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise UserError(f"pycuda: cannot be loaded ({error}). {_INSTALL}") from None
        try:
            cuda.init()
            count = cuda.Device.count()
            if not 0 <= device < count:
                raise UserError(f"device: expected 0 to {count - 1} on this machine, got {device}.")
            gpu = cuda.Device(device)
            self._context = gpu.retain_primary_context()
        except cuda.Error as error:
            raise UserError(f"device: CUDA cannot use GPU {device} ({error}). Check `nvidia-smi`.") from None
        self.gpu = Gpu(gpu.name(), "sm{}{}".format(*gpu.compute_capability()))
        version = cuda.get_driver_version()
        self.cuda = f"CUDA {version // 1000}.{version % 1000 // 10}"
        self._cuda = cuda
        self._graphs = GraphCalls(ctypes.CDLL("libcuda.so.1"))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU current in the calling thread for the length of the block."""
        self._context.push()
        try:
            yield
        except self._cuda.MemoryError as error:
            raise MemoryError(str(error)) from None
        except self._cuda.Error as error:
            raise DriverError(str(error)) from None
        finally:
            self._context.pop()

    def stream(self) -> Any:
        """Create a stream."""
        return self._cuda.Stream(_NON_BLOCKING)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Allocate page-locked host memory."""
        return self._cuda.pagelocked_empty(shape, dtype)

    def allocate(self, size: int) -> Any:
        """Allocate ``size`` bytes of device memory; ``int()`` of the result is the address."""
        return self._cuda.mem_alloc(size)

    def free(self, memory: Any) -> None:
        """Free memory of ``pinned`` or ``allocate``."""
        owner: Any = memory.base if isinstance(memory, np.ndarray) else memory
        owner.free()

    def copy_in(self, device: Any, host: NDArray[Any], stream: Any) -> None:
        """Copy to the device asynchronously."""
        self._cuda.memcpy_htod_async(device, host, stream)

    def copy_out(self, host: NDArray[np.float32], device: Any, stream: Any) -> None:
        """Copy from the device asynchronously."""
        self._cuda.memcpy_dtoh_async(host, device, stream)

    def synchronise(self, stream: Any) -> None:
        """Wait until a stream has finished its work."""
        stream.synchronize()

    def capture(self, stream: Any, enqueue: Callable[[], bool]) -> int:
        """Capture the work that ``enqueue`` puts on a stream as a CUDA graph, without running it."""
        return self._graphs.capture(stream.handle, enqueue)

    def launch(self, graph: int, stream: Any) -> None:
        """Enqueue a graph on a stream."""
        self._graphs.launch(graph, stream.handle)

    def discard(self, graph: int) -> None:
        """Destroy a graph."""
        self._graphs.discard(graph)


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
