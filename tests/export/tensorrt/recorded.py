"""Test doubles of the driver and of TensorRT, which record calls and move real memory in stream order.

The work of a stream runs when the host waits for it, so a result that is read too early is wrong. With ``eager_copies``
copies to the GPU run at once, so an input that is overwritten too early is wrong too. A simulated clock gives each
stream a time line: copies and kernels of different streams overlap, unless an event makes one wait for the other.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.tensorrt.cuda_driver import FLOAT32, DriverError, Gpu
from export.tensorrt.runner import EngineRunner
from vpr.artifacts.store import Artifact

IMAGE, DIM = (3, 4, 4), 5
VERSION = "11.4.0.106"


def expected(batch: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the embeddings of the test engine: the mean of each image, times 1 to 5."""
    return (batch.mean(axis=(1, 2, 3))[:, None] * np.arange(1, DIM + 1)).astype(np.float32)


@dataclass
class Event:
    stream: Stream | None = None
    number: int = 0  # the event is reached when its stream has run the first `number` jobs
    time: float = 0.0

    def reach(self) -> None:
        if self.stream is not None:
            self.stream.run(self.number)


@dataclass
class Stream:
    handle: int
    jobs: list[Callable[[], None]] = field(default_factory=list)
    done: int = 0
    time: float = 0.0
    captured: list[Callable[[], None]] | None = None

    def put(self, job: Callable[[], None], start: float = 0.0, cost: float = 0.0, is_eager: bool = False) -> None:
        if self.captured is not None:
            self.captured.append(job)
            return
        self.time = max(self.time, start) + cost
        self.jobs.append(job)
        if is_eager and self.done == len(self.jobs) - 1:
            self.run(len(self.jobs))

    def run(self, number: int) -> None:
        while self.done < number:
            self.done += 1
            self.jobs[self.done - 1]()


class Memory:
    def __init__(self, address: int, size: int) -> None:
        self.address, self.bytes = address, bytearray(size)

    def __int__(self) -> int:
        return self.address


class RecordedDriver:
    device = 0

    def __init__(self, architecture: str = "sm86", free_bytes: int = 1 << 30, eager_copies: bool = False) -> None:
        self.gpu, self.cuda = Gpu("NVIDIA Test", architecture), "CUDA 13.0"
        self.eager_copies = eager_copies
        self.costs = {"copy_in": 2.0, "kernels": 3.0, "copy_out": 0.1}  # milliseconds of the simulated clock
        self.clock = 0.0  # time of the host
        self.sources: list[NDArray[Any]] = []  # arrays that were copied to the GPU
        self.destroyed: list[Any] = []
        self.calls: list[tuple[Any, ...]] = []
        self.free_bytes = free_bytes
        self.streams: dict[int, Stream] = {}
        self.memory: dict[int, Memory] = {}
        self.pinned_arrays: list[NDArray[Any]] = []
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.rejects_capture = False
        self._thread = threading.local()
        self._next = 0
        self._address = 4096

    def note(self, *call: Any) -> None:
        assert getattr(self._thread, "current", False), f"{call}: no context is current in this thread"
        self.calls.append((threading.get_ident(), *call))

    def names(self) -> list[str]:
        return [call[1] for call in self.calls]

    @contextmanager
    def current(self) -> Iterator[None]:
        self._thread.current = True
        try:
            yield
        finally:
            self._thread.current = False

    def number(self) -> int:
        self._next += 1
        return self._next

    def stream(self) -> Stream:
        stream = Stream(self.number())
        self.streams[stream.handle] = stream
        self.note("stream", stream.handle)
        return stream

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any] = FLOAT32) -> NDArray[Any]:
        self.note("pinned", shape)
        self.pinned_arrays.append(np.full(shape, np.nan if dtype == np.float32 else 99, dtype))
        return self.pinned_arrays[-1]

    def allocate(self, size: int) -> Memory:
        if size > self.free_bytes:
            raise MemoryError("cuMemAlloc failed: out of memory")
        self.free_bytes -= size
        memory = Memory(self._address, size)
        self._address += (size + 255) // 256 * 256
        self.memory[memory.address] = memory
        self.note("allocate", size)
        return memory

    def free(self, memory: Any) -> None:
        self.note("free")
        if isinstance(memory, Memory):
            self.free_bytes += len(memory.bytes)
            del self.memory[memory.address]
        else:
            self.pinned_arrays = [array for array in self.pinned_arrays if array is not memory]

    def event(self) -> Event:
        self.note("event")
        return Event()

    def record(self, event: Event, stream: Stream) -> None:
        self.note("record", stream.handle)
        event.stream, event.number, event.time = stream, len(stream.jobs), max(stream.time, self.clock)

    def wait(self, stream: Stream, event: Event) -> None:
        self.note("wait", stream.handle)
        stream.put(Event(event.stream, event.number).reach, event.time)

    def wait_on_host(self, event: Event) -> None:
        self.note("wait_on_host")
        event.reach()
        self.clock = max(self.clock, event.time)

    def milliseconds(self, start: Event, end: Event) -> float:
        assert end.stream is not None
        assert end.stream.done >= end.number
        return end.time - start.time

    def destroy(self, stream_or_event: Any) -> None:
        self.note("destroy")
        self.destroyed.append(stream_or_event)

    def copy_in(self, device: int, host: NDArray[Any], stream: Stream) -> None:
        self.note("copy_in", stream.handle, len(host))
        assert host.flags.c_contiguous
        self.sources.append(host)
        memory = self.memory[device]
        stream.put(
            lambda: memory.bytes.__setitem__(slice(host.nbytes), host.tobytes()),
            self.clock,
            self.costs["copy_in"],
            self.eager_copies,
        )

    def copy_out(self, host: NDArray[np.float32], device: int, stream: Stream) -> None:
        self.note("copy_out", stream.handle, len(host))
        memory = self.memory[device]
        stream.put(
            lambda: host.__setitem__(..., np.frombuffer(memory.bytes, np.float32, host.size).reshape(host.shape)),
            self.clock,
            self.costs["copy_out"],
        )

    def copy_on_device(self, target: int, source: int, size: int, stream: Stream) -> None:
        """Copy between memory of the double and real memory, which stands for that of another library."""
        self.note("copy_on_device", stream.handle, size)

        def copy() -> None:
            self._view(target, size)[:] = bytes(self._view(source, size))

        stream.put(copy, self.clock)

    def _view(self, address: int, size: int) -> Any:
        base = max((start for start in self.memory if start <= address), default=-1)
        if base >= 0 and address + size <= base + len(self.memory[base].bytes):
            return memoryview(self.memory[base].bytes)[address - base : address - base + size]
        return memoryview((ctypes.c_char * size).from_address(address)).cast("B")

    def synchronise(self, stream: Stream) -> None:
        self.note("synchronise", stream.handle)
        stream.run(len(stream.jobs))
        self.clock = max(self.clock, stream.time)

    def capture(self, stream: Stream, enqueue: Callable[[], bool]) -> int:
        self.note("capture", stream.handle)
        if self.rejects_capture:
            raise DriverError("cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901)")
        stream.captured = []
        assert enqueue()
        number = self.number()
        self.graphs[number], stream.captured = stream.captured, None
        return number

    def launch(self, graph: int, stream: Stream) -> None:
        self.note("launch", stream.handle, graph)
        for job in self.graphs[graph]:
            stream.put(job, self.clock, self.costs["kernels"])

    def discard(self, graph: int) -> None:
        self.note("discard", graph)
        del self.graphs[graph]


class Context:
    """An execution context that, like TensorRT's, must not be captured right after its shape has changed."""

    def __init__(self, engine: Engine, settings: Any) -> None:
        self.engine, self.settings = engine, settings
        self.shape: tuple[int, ...] | None = None
        self.profile, self.flushed, self.frozen = 0, False, False
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch = (memory, size)

    def set_optimization_profile_async(self, index: int, handle: int) -> bool:
        self.engine.driver.note("profile", index)
        if self.engine.rejects_profile:  # the binding raises where the C++ call returns false
            raise RuntimeError("Error in set optimization profile async.")
        self.profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.engine.driver.note("shape", name, shape)
        assert not self.frozen, "the context of a graph was changed"
        low, _, high = self.engine.ranges[self.profile]
        self.shape, self.flushed = shape, False
        return low <= shape[0] <= high

    def execute_async_v3(self, handle: int) -> bool:
        driver, engine = self.engine.driver, self.engine
        driver.note("enqueue", handle, id(self))
        stream = driver.streams[handle]
        if engine.fails:
            engine.logger.log("ERROR", engine.fails)
            return False
        assert self.shape is not None
        assert not engine.needs_scratch or self.scratch is not None
        if stream.captured is not None:
            assert self.flushed, "captured before the new shape was run"
            self.frozen = True
        self.flushed = True
        source, target = (driver.memory[self.addresses[name]] for name in ("pixels", "embedding"))
        shape = self.shape

        def compute() -> None:
            pixels = np.frombuffer(bytes(source.bytes), engine.input_dtype, int(np.prod(shape))).reshape(shape)
            result = expected(pixels).tobytes()
            target.bytes[: len(result)] = result

        stream.put(compute, driver.clock, driver.costs["kernels"])
        return True


class RuntimeCache:
    """TensorRT-RTX's runtime cache; like it, rejects what another GPU or version has written."""

    def __init__(self) -> None:
        self.content = b"rtx:"

    def deserialize(self, content: bytes) -> bool:
        if content.startswith(b"rtx:"):
            self.content = bytes(content)
        return content.startswith(b"rtx:")

    def serialize(self) -> bytes:
        return self.content


class RuntimeConfig:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.cuda_graph_strategy, self.dynamic_shapes_kernel_specialization_strategy = "DISABLED", "LAZY"
        self.cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        self._engine.runtime_caches.append(RuntimeCache())
        return self._engine.runtime_caches[-1]

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    num_io_tensors = 2

    def __init__(self, driver: RecordedDriver, logger: Any, **settings: Any) -> None:
        self.driver, self.logger = driver, logger
        self.ranges = settings.get("ranges", [(1, 4, 8)])
        self.needs_scratch = settings.get("needs_scratch", True)
        self.fails = settings.get("fails", "")
        self.rejects_profile = settings.get("rejects_profile", False)
        self.runtime_caches: list[RuntimeCache] = []
        self.tensors = settings.get("tensors", ("pixels", "embedding"))
        self.device_memory_size_v2 = 64
        self.input_dtype = np.dtype(settings.get("input_dtype", np.float32))
        self.contexts: list[Context] = []

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.ranges)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *IMAGE) if name == "pixels" else (-1, DIM)

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        is_uint8 = name == "pixels" and self.input_dtype == np.uint8
        return SimpleNamespace(name="UINT8" if is_uint8 else "FLOAT")

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [(batch, *IMAGE) for batch in self.ranges[index]]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self)

    def create_execution_context(self, settings: Any) -> Context:
        self.driver.note("context")
        self.contexts.append(Context(self, settings))
        return self.contexts[-1]


class Trt(SimpleNamespace):
    """Double of ``tensorrt`` and ``tensorrt_rtx_bindings``; ``load_error`` is logged for a plan that does not load."""

    def __init__(self, driver: RecordedDriver, version: str = VERSION, load_error: str = "", **settings: Any) -> None:
        class ILogger:
            INTERNAL_ERROR, ERROR = "INTERNAL_ERROR", "ERROR"

            def __init__(self) -> None:
                pass

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger
                if settings.get("no_runtime"):
                    logger.log("ERROR", settings["no_runtime"])
                    raise TypeError("pybind11::init(): factory function returned nullptr")

            def deserialize_cuda_engine(runtime, plan: bytes) -> Engine | None:  # noqa: N805
                driver.note("deserialise", len(plan), runtime.engine_host_code_allowed)
                if load_error:
                    runtime.logger.log("ERROR", load_error)
                    return None
                self.engines.append(Engine(driver, runtime.logger, **settings))
                return self.engines[-1]

        super().__init__(
            __version__=version,
            ILogger=ILogger,
            Runtime=Runtime,
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="USER_MANAGED"),
            CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE", DISABLED="DISABLED"),
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(LAZY="LAZY", EAGER="EAGER"),
            engines=[],
        )


def runner(artifact: Artifact, driver: RecordedDriver, graphs: bool = True, **settings: Any) -> EngineRunner:
    """Open an engine of the doubles."""
    return EngineRunner(artifact, Trt(driver, **settings), driver, graphs)


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Return (count, 3, 4, 4) random images."""
    return np.random.default_rng(seed).normal(size=(count, *IMAGE)).astype(np.float32)
