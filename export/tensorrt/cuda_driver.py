"""What running an engine needs of CUDA, and its implementation by PyCUDA.

PyCUDA aborts the process when a thread ends with a context still on its stack, and frees nothing while no
context is current. So the context is current only inside ``with driver.current()``, and all else happens there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: work on the legacy default stream neither waits nor breaks a capture
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
_REMEDY = "pip install -r requirements-gpu.txt, on a machine with an NVIDIA GPU"


class DriverError(Exception):
    """CUDA or TensorRT refused a call; the message says which."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, and its architecture as ``sm89``."""

    name: str
    architecture: str


class Stream(Protocol):
    """A CUDA stream: work in the order it was given."""

    @property
    def handle(self) -> int:
        """The driver's ``CUstream``."""


class Driver(Protocol):
    """One GPU.

    Every method but ``current`` is called inside ``with driver.current()``, which raises :class:`DriverError`
    and, where the GPU's memory does not suffice, :class:`MemoryError` for what fails there.
    """

    gpu: Gpu
    cuda: str

    def current(self) -> AbstractContextManager[None]:
        """Make the GPU the calling thread's, for the length of the block."""

    def stream(self) -> Stream:
        """A new stream."""

    def pinned(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Page-locked host memory."""

    def allocate(self, size: int) -> Any:
        """Device memory of ``size`` bytes; its ``int`` is the address."""

    def free(self, memory: Any) -> None:
        """Give back what ``pinned`` or ``allocate`` gave."""

    def copy_in(self, device: Any, host: NDArray[np.float32], stream: Stream) -> None:
        """Copy to the device, without waiting."""

    def copy_out(self, host: NDArray[np.float32], device: Any, stream: Stream) -> None:
        """Copy from the device, without waiting."""

    def synchronise(self, stream: Stream) -> None:
        """Wait for all work of a stream."""

    def capture(self, stream: Stream, enqueue: Callable[[], bool]) -> Any:
        """The work that ``enqueue`` puts on a stream as a CUDA graph; nothing is run."""

    def launch(self, graph: Any, stream: Stream) -> None:
        """Put a graph on a stream."""

    def discard(self, graph: Any) -> None:
        """Give back a graph."""


class PyCudaDriver:
    """One GPU by PyCUDA, in its primary context, which other libraries of the process share.

    Args:
        device: number of the GPU, by CUDA's order.

    Raises:
        UserError: PyCUDA is not installed, or there is no such GPU or no driver for it.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise UserError(f"pycuda: cannot be loaded ({error}): {_REMEDY}") from None
        try:
            cuda.init()
            count = cuda.Device.count()
            if not 0 <= device < count:
                raise UserError(f"device {device}: this machine has GPUs 0 to {count - 1}: choose one of them")
            chosen = cuda.Device(device)
            self._context = chosen.retain_primary_context()
        except cuda.Error as error:
            raise UserError(f"device {device}: CUDA cannot use it ({error}): see 'nvidia-smi' and the driver") from None
        self.gpu = Gpu(chosen.name(), "sm{}{}".format(*chosen.compute_capability()))
        version = cuda.get_driver_version()
        self.cuda = f"CUDA {version // 1000}.{version % 1000 // 10}"
        self._cuda = cuda
        self._graphs = GraphCalls(ctypes.CDLL("libcuda.so.1"))

    @contextmanager
    def current(self) -> Iterator[None]:
        """See :class:`Driver`."""
        self._context.push()
        try:
            yield
        except self._cuda.MemoryError as error:
            raise MemoryError(str(error)) from None
        except self._cuda.Error as error:
            raise DriverError(str(error)) from None
        finally:
            self._context.pop()

    def stream(self) -> Stream:
        """See :class:`Driver`."""
        return self._cuda.Stream(_NON_BLOCKING)

    def pinned(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """See :class:`Driver`."""
        return self._cuda.pagelocked_empty(shape, np.float32)

    def allocate(self, size: int) -> Any:
        """See :class:`Driver`."""
        return self._cuda.mem_alloc(size)

    def free(self, memory: Any) -> None:
        """See :class:`Driver`."""
        owner: Any = memory.base if isinstance(memory, np.ndarray) else memory
        owner.free()

    def copy_in(self, device: Any, host: NDArray[np.float32], stream: Stream) -> None:
        """See :class:`Driver`."""
        self._cuda.memcpy_htod_async(device, host, stream)

    def copy_out(self, host: NDArray[np.float32], device: Any, stream: Stream) -> None:
        """See :class:`Driver`."""
        self._cuda.memcpy_dtoh_async(host, device, stream)

    def synchronise(self, stream: Any) -> None:
        """See :class:`Driver`."""
        stream.synchronize()

    def capture(self, stream: Stream, enqueue: Callable[[], bool]) -> int:
        """See :class:`Driver`."""
        return self._graphs.capture(stream.handle, enqueue)

    def launch(self, graph: int, stream: Stream) -> None:
        """See :class:`Driver`."""
        self._graphs.launch(graph, stream.handle)

    def discard(self, graph: int) -> None:
        """See :class:`Driver`."""
        self._graphs.discard(graph)


class GraphCalls:
    """CUDA graphs by the driver's own calls, which PyCUDA (2026.1) does not have.

    Args:
        library: ``libcuda.so.1``.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def capture(self, stream: int, enqueue: Callable[[], bool]) -> int:
        """Capture what ``enqueue`` puts on a stream; the handle of the executable graph.

        Raises:
            DriverError: ``enqueue`` returned False, or the driver refuses the capture.
        """
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _THREAD_LOCAL)
        accepted = False
        try:
            accepted = enqueue()
        finally:
            # A stream that is left capturing runs nothing any more.
            ended = self._library.cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
        if not accepted:
            raise DriverError("the engine refuses to be captured")
        self._check("cuStreamEndCapture", ended)
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)
        return int(executable.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        """Put a graph on a stream."""
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
