"""The CUDA driver by ``cuda-bindings``, a wheel that torch installs; it needs no compiler."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.tensorrt.cuda_driver import (
    FLOAT32,
    NON_BLOCKING,
    DriverError,
    Gpu,
    GraphCalls,
    GraphMethods,
    check_device,
    cuda_version,
    explain_unusable,
)

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


@dataclass(frozen=True)
class BindingsStream:
    """A stream as cuda-bindings names it, and its address."""

    raw: Any
    handle: int


class CudaBindingsDriver(GraphMethods):
    """See :class:`export.tensorrt.cuda_driver.CudaDriver`; take it from ``open_driver``, not from here.

    :class:`UserError` if the GPU does not exist, or CUDA cannot use it.
    """

    def __init__(self, device: int = 0) -> None:
        from cuda.bindings import driver as cuda

        self._cuda = cuda
        self._pinned: dict[int, int] = {}  # address of each page-locked array, by the address of its first element
        try:
            self._call("cuInit", 0)
            check_device(device, self._call("cuDeviceGetCount"))
            handle = self._call("cuDeviceGet", device)
            # Retained for the life of the process: torch and TensorRT may use the context longer than this object.
            self._context = self._call("cuDevicePrimaryCtxRetain", handle)
            name = self._call("cuDeviceGetName", 256, handle)
            kinds = cuda.CUdevice_attribute
            major, minor = (
                self._call("cuDeviceGetAttribute", kind, handle)
                for kind in (
                    kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                    kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                )
            )
            version = self._call("cuDriverGetVersion")
        except (DriverError, MemoryError, RuntimeError) as error:  # RuntimeError: there is no libcuda.so.1
            raise explain_unusable(device, error) from None
        self.device, self.cuda = device, cuda_version(version)
        self.gpu = Gpu(name.partition(b"\0")[0].decode(errors="replace"), f"sm{major}{minor}")
        self._graphs = GraphCalls(ctypes.CDLL("libcuda.so.1"))

    @contextmanager
    def current(self) -> Iterator[None]:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def stream(self) -> BindingsStream:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        raw = self._call("cuStreamCreate", NON_BLOCKING)
        return BindingsStream(raw, int(raw))

    def event(self) -> Any:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        return self._call("cuEventCreate", 0)

    def record(self, event: Any, stream: BindingsStream) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._call("cuEventRecord", event, stream.raw)

    def wait(self, stream: BindingsStream, event: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._call("cuStreamWaitEvent", stream.raw, event, 0)

    def wait_on_host(self, event: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._call("cuEventSynchronize", event)

    def milliseconds(self, start: Any, end: Any) -> float:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        return float(self._call("cuEventElapsedTime", start, end))

    def destroy(self, stream_or_event: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        if isinstance(stream_or_event, BindingsStream):
            self._call("cuStreamDestroy", stream_or_event.raw)
        else:
            self._call("cuEventDestroy", stream_or_event)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any] = FLOAT32) -> NDArray[Any]:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        size = int(np.prod(shape)) * dtype.itemsize
        address = int(self._call("cuMemHostAlloc", size, 0))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)
        self._pinned[array.ctypes.data] = address
        return array

    def allocate(self, size: int) -> Any:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        return self._call("cuMemAlloc", size)

    def free(self, memory: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        if isinstance(memory, np.ndarray):
            self._call("cuMemFreeHost", self._pinned.pop(memory.ctypes.data))
        else:
            self._call("cuMemFree", memory)

    def memory(self) -> tuple[int, int]:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        free, total = self._call("cuMemGetInfo")
        return free, total

    def copy_in(self, device: int, host: NDArray[Any], stream: BindingsStream) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._call("cuMemcpyHtoDAsync", device, host.ctypes.data, host.nbytes, stream.raw)

    def copy_out(self, host: NDArray[np.float32], device: int, stream: BindingsStream) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._call("cuMemcpyDtoHAsync", host.ctypes.data, device, host.nbytes, stream.raw)

    def copy_on_device(self, target: int, source: int, size: int, stream: BindingsStream) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._call("cuMemcpyDtoDAsync", target, source, size, stream.raw)

    def synchronise(self, stream: BindingsStream) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._call("cuStreamSynchronize", stream.raw)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function, and return its value, or its values if it has several."""
        status, *values = getattr(self._cuda, name)(*arguments)
        if int(status):
            message = f"{name}: {status.name} ({int(status)})"
            raise MemoryError(message) if int(status) == _OUT_OF_MEMORY else DriverError(message)
        return values[0] if len(values) == 1 else tuple(values)
