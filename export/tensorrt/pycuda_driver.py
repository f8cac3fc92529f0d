"""The CUDA driver by PyCUDA, which compiles on installation."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
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


class PyCudaDriver(GraphMethods):
    """See :class:`export.tensorrt.cuda_driver.CudaDriver`; take it from ``open_driver``, not from here.

    :class:`UserError` if the GPU does not exist, or CUDA cannot use it.
    """

    def __init__(self, device: int = 0) -> None:
        import pycuda.driver as cuda

        try:
            cuda.init()
            check_device(device, cuda.Device.count())
            gpu = cuda.Device(device)
            self._context = gpu.retain_primary_context()
        except cuda.Error as error:
            raise explain_unusable(device, error) from None
        # PyCUDA destroys the object of a primary context by cuCtxDetach, which is wrong for one. This reference, which
        # nothing gives back, keeps the object until the process ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._context))
        self.device, self.cuda = device, cuda_version(cuda.get_driver_version())
        self.gpu = Gpu(gpu.name(), "sm{}{}".format(*gpu.compute_capability()))
        self._cuda = cuda
        self._graphs = GraphCalls(ctypes.CDLL("libcuda.so.1"))

    @contextmanager
    def current(self) -> Iterator[None]:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        is_pushed = False
        try:
            self._context.push()
            is_pushed = True
            yield
        except self._cuda.MemoryError as error:
            raise MemoryError(str(error)) from None
        except self._cuda.Error as error:
            raise DriverError(str(error)) from None
        finally:
            if is_pushed:
                self._context.pop()

    def stream(self) -> Any:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        return self._cuda.Stream(NON_BLOCKING)

    def event(self) -> Any:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        return self._cuda.Event()

    def record(self, event: Any, stream: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        stream.wait_for_event(event)

    def wait_on_host(self, event: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        event.synchronize()

    def milliseconds(self, start: Any, end: Any) -> float:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        return float(end.time_since(start))

    def destroy(self, stream_or_event: Any) -> None:
        """Do nothing: PyCUDA destroys streams and events with their objects."""

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any] = FLOAT32) -> NDArray[Any]:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        return self._cuda.pagelocked_empty(shape, dtype)

    def allocate(self, size: int) -> Any:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        return self._cuda.mem_alloc(size)

    def free(self, memory: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        owner: Any = memory.base if isinstance(memory, np.ndarray) else memory
        owner.free()

    def memory(self) -> tuple[int, int]:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        free, total = self._cuda.mem_get_info()
        return free, total

    def copy_in(self, device: int, host: NDArray[Any], stream: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._cuda.memcpy_htod_async(device, host, stream)

    def copy_out(self, host: NDArray[np.float32], device: int, stream: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._cuda.memcpy_dtoh_async(host, device, stream)

    def copy_on_device(self, target: int, source: int, size: int, stream: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        self._cuda.memcpy_dtod_async(target, source, size, stream)

    def synchronise(self, stream: Any) -> None:
        """See :class:`export.tensorrt.cuda_driver.CudaDriver`."""
        stream.synchronize()
