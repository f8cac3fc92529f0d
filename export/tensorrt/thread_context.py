"""One thread's share of a loaded engine: execution contexts, streams, buffers and CUDA graphs."""

import math
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.tensorrt.cuda_driver import CudaDriver, DriverError
from export.tensorrt.kernel_cache import KernelCache
from export.tensorrt.profiles import Chunk, Profile, split_batch
from vpr.common.log import get_logger
from vpr.imaging.preprocess import ModelInput
from vpr.inference.onnx_session import INPUT, OUTPUT

log = get_logger(__name__)

_MAX_GRAPHS = 16
_SLOTS = 2  # chunks in flight: one is copied while the other one is computed
_FLOAT_BYTES = np.dtype(np.float32).itemsize


@dataclass
class LoadedEngine:
    """A deserialised engine."""

    trt: ModuleType  # Python module that loaded the engine
    runtime: Any  # TensorRT's ``IRuntime``, which must outlive the engine
    engine: Any  # TensorRT's ``ICudaEngine``
    # whether the builder captures CUDA graphs itself; TensorRT-RTX does: it compiles the kernels of a shape while it
    # already runs, so only the library knows when to capture
    native_graphs: bool
    profiles: tuple[Profile, ...]  # optimisation profiles of the engine
    image: tuple[int, ...]  # shape of an input image, such as (3, size, size)
    input_dtype: np.dtype[Any]  # float32 or uint8
    dim: int  # dimension of the embeddings
    errors: list[str]  # errors that TensorRT has logged
    is_eager: bool = False  # whether TensorRT-RTX compiles a shape's kernels before it runs them
    kernels: KernelCache = field(default_factory=KernelCache)  # kernels that TensorRT-RTX has compiled

    @property
    def max_batch(self) -> int:
        """Largest batch of one execution."""
        return max(profile.max_batch for profile in self.profiles)

    @property
    def image_bytes(self) -> int:
        """Bytes of one input image."""
        return self.input_dtype.itemsize * math.prod(self.image)

    @property
    def row_bytes(self) -> int:
        """Bytes of one embedding."""
        return _FLOAT_BYTES * self.dim

    def failure(self, problem: str) -> Exception:
        """Return the exception for a failed call, with the error that TensorRT logged last."""
        reason = " ".join(self.errors[-1].split())[:200] if self.errors else "no reason given"
        kind = MemoryError if "out of memory" in reason.lower() else DriverError
        return kind(f"{problem} ({reason})")


@dataclass
class _ExecutionContext:
    """Execution context, the settings that must outlive it, and its current batch size."""

    context: Any
    settings: Any
    size: int = 0


@dataclass(frozen=True)
class _Slot:
    """Buffers of one chunk in flight, and the events that order its copies and kernels."""

    index: int
    input: Any  # device memory of the images
    output: Any  # device memory of the embeddings
    host_out: NDArray[np.float32]  # page-locked embeddings
    loaded: Any  # event: the images are in device memory
    done: Any  # event: the embeddings are in host memory


class ThreadContext:
    """Runs batches in sequence; one thread at a time uses it and holds ``lock``.

    A batch above the engine's largest runs in chunks, alternately in two slots: a second stream copies the images of
    one chunk while the first stream computes the other one. The second use of a batch size in a slot captures a CUDA
    graph, if ``graphs``. Each graph has its own execution context, because a graph belongs to the state of its context
    and that context must not change its shape any more. All contexts share their scratch memory, because one stream
    runs them in turn.
    """

    def __init__(self, engine: LoadedEngine, driver: CudaDriver, graphs: bool) -> None:
        self.lock = threading.Lock()
        self._engine, self._driver, self._graphs = engine, driver, graphs
        self._contexts: dict[tuple[int, int], _ExecutionContext] = {}
        self._replays: dict[tuple[int, int], tuple[_ExecutionContext, Any]] = {}  # by batch size and slot
        self._uses: Counter[tuple[int, int]] = Counter()
        self._buffers: list[Any] = []
        self._streams_and_events: list[Any] = []
        self._slots: list[_Slot] = []
        self._staging: list[NDArray[Any] | None] = [None] * _SLOTS
        self._copies: Any = None
        try:
            self._stream: Any | None = self._create(driver.stream)
            self._slot(0)
            self._scratch_size = 0 if engine.native_graphs else int(engine.engine.device_memory_size_v2)
            self._scratch = self._keep(driver.allocate(self._scratch_size)) if self._scratch_size else None
        except BaseException:
            self.close()
            raise

    @property
    def handle(self) -> int:
        """Address of the stream that computes."""
        assert self._stream is not None
        return int(self._stream.handle)

    def run(self, batch: ModelInput) -> NDArray[np.float32]:
        """Embed n images of the engine's input as (n, dim) float32, inside ``with driver.current()``."""
        embeddings = np.empty((len(batch), self._engine.dim), np.float32)
        chunks = list(split_batch(len(batch), self._engine.profiles))
        try:
            if len(chunks) == 1:
                self._run_one(chunks[0], batch, embeddings)
            else:
                self._run_overlapped(chunks, batch, embeddings)
        except BaseException:
            self._drain()
            raise
        self._capture_repeated(chunks)
        return embeddings

    def run_on_device(self, pixels: int, embeddings: int, count: int) -> None:
        """Embed ``count`` images between two device addresses, inside ``with driver.current()``.

        Each chunk is copied to and from a slot, on the device: a copy takes microseconds, and only a fixed address can
        be part of a CUDA graph.
        """
        driver, stream, slot, engine = self._driver, self._stream, self._slot(0), self._engine
        chunks = list(split_batch(count, engine.profiles))
        try:
            for chunk in chunks:
                rows, start = chunk.stop - chunk.start, pixels + chunk.start * engine.image_bytes
                driver.copy_on_device(int(slot.input), start, rows * engine.image_bytes, stream)
                last = start + (rows - 1) * engine.image_bytes
                for row in range(rows, chunk.size):
                    padding = int(slot.input) + row * engine.image_bytes
                    driver.copy_on_device(padding, last, engine.image_bytes, stream)
                self._enqueue(chunk, slot)
                target = embeddings + chunk.start * engine.row_bytes
                driver.copy_on_device(target, int(slot.output), rows * engine.row_bytes, stream)
            driver.synchronise(stream)
        except BaseException:
            self._drain()
            raise
        self._capture_repeated(chunks[:1] + chunks[-1:], slots=1)

    def measure(self, batch: int, calls: int) -> NDArray[np.float64]:
        """Return the GPU's milliseconds of ``calls`` executions of a batch, without copies: (calls,) float64."""
        driver = self._driver
        images = np.zeros((batch, *self._engine.image), self._engine.input_dtype)
        for _ in range(3):  # compile kernels, and capture the graphs
            self.run(images)
        chunks = list(split_batch(batch, self._engine.profiles))
        start, end = driver.event(), driver.event()
        times = []
        try:
            for _ in range(calls):
                driver.record(start, self._stream)
                for index, chunk in enumerate(chunks):
                    self._enqueue(chunk, self._slot(index % _SLOTS))
                driver.record(end, self._stream)
                driver.wait_on_host(end)
                times.append(driver.milliseconds(start, end))
        finally:
            driver.destroy(start)
            driver.destroy(end)
        return np.array(times)

    def close(self) -> None:
        """Free graphs, contexts, buffers, streams and events, inside ``with driver.current()``."""
        for _, graph in self._replays.values():
            self._driver.discard(graph)
        self._replays.clear()
        self._contexts.clear()
        self._slots.clear()
        self._staging = [None] * _SLOTS
        while self._buffers:
            self._driver.free(self._buffers.pop())
        self._stream = self._copies = None
        while self._streams_and_events:
            self._driver.destroy(self._streams_and_events.pop())

    def _run_one(self, chunk: Chunk, batch: ModelInput, embeddings: NDArray[np.float32]) -> None:
        slot, stream = self._slot(0), self._stream
        self._driver.copy_in(int(slot.input), self._images(chunk, batch, slot), stream)
        self._enqueue(chunk, slot)
        self._driver.copy_out(slot.host_out[: len(batch)], int(slot.output), stream)
        self._driver.synchronise(stream)
        embeddings[:] = slot.host_out[: len(batch)]

    def _run_overlapped(self, chunks: list[Chunk], batch: ModelInput, embeddings: NDArray[np.float32]) -> None:
        driver, stream = self._driver, self._stream
        if self._copies is None:
            self._copies = self._create(driver.stream)

        def collect(chunk: Chunk, slot: _Slot) -> None:
            driver.wait_on_host(slot.done)
            embeddings[chunk.start : chunk.stop] = slot.host_out[: chunk.stop - chunk.start]

        for index, chunk in enumerate(chunks):
            slot = self._slot(index % _SLOTS)
            if index >= _SLOTS:  # the slot's kernels no longer read its images
                collect(chunks[index - _SLOTS], slot)
            driver.copy_in(int(slot.input), self._images(chunk, batch, slot), self._copies)
            driver.record(slot.loaded, self._copies)
            driver.wait(stream, slot.loaded)
            self._enqueue(chunk, slot)
            driver.copy_out(slot.host_out[: chunk.stop - chunk.start], int(slot.output), stream)
            driver.record(slot.done, stream)
        for index in range(len(chunks) - _SLOTS, len(chunks)):
            collect(chunks[index], self._slot(index % _SLOTS))

    def _images(self, chunk: Chunk, batch: ModelInput, slot: _Slot) -> ModelInput:
        """Return a chunk's images as one contiguous block: the caller's memory, or a copy with padding."""
        images = batch[chunk.start : chunk.stop]
        if len(images) == chunk.size and images.flags.c_contiguous:
            return images
        staging = self._staging[slot.index]
        if staging is None:
            shape = (self._engine.max_batch, *self._engine.image)
            staging = self._staging[slot.index] = self._keep(self._driver.pinned(shape, self._engine.input_dtype))
        staging[: len(images)] = images
        staging[len(images) : chunk.size] = images[-1]
        return staging[: chunk.size]

    def _enqueue(self, chunk: Chunk, slot: _Slot) -> None:
        key = (chunk.size, slot.index)
        self._uses[key] += 1
        if key in self._replays:
            self._driver.launch(self._replays[key][1], self._stream)
            return
        place = (chunk.profile, slot.index)
        if place not in self._contexts:
            self._contexts[place] = self._create_context(chunk.profile, slot)
        self._execute(self._contexts[place], chunk.size)

    def _capture_repeated(self, chunks: list[Chunk], slots: int = _SLOTS) -> None:
        """Capture the graphs of batch sizes that were used twice or more."""
        if self._engine.native_graphs:
            return
        for index, chunk in enumerate(chunks):
            slot = self._slot(index % slots)
            key = (chunk.size, slot.index)
            if self._graphs and self._uses[key] >= 2 and key not in self._replays and len(self._replays) < _MAX_GRAPHS:
                self._capture(chunk, slot)

    def _capture(self, chunk: Chunk, slot: _Slot) -> None:
        """Capture the graph of a batch size; if that fails, continue without graphs and log a warning."""
        stream = self._stream
        assert stream is not None
        try:
            execution = self._create_context(chunk.profile, slot)
            # The first execution of a new shape does work that cannot be captured.
            self._execute(execution, chunk.size)
            graph = self._driver.capture(stream, lambda: bool(execution.context.execute_async_v3(stream.handle)))
            self._replays[chunk.size, slot.index] = (execution, graph)
        except (DriverError, MemoryError) as error:
            self._graphs = False
            log.warning(f"engine: continues without CUDA graphs ({error})")
        finally:
            self._driver.synchronise(stream)

    def _create_context(self, profile: int, slot: _Slot) -> _ExecutionContext:
        """Create an execution context whose tensors use a slot's buffers."""
        assert self._stream is not None
        loaded, trt, engine = self._engine, self._engine.trt, self._engine.engine
        settings: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if loaded.native_graphs:
            settings = engine.create_runtime_config()
            graphs, kernels = trt.CudaGraphStrategy, trt.DynamicShapesKernelSpecializationStrategy
            settings.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if self._graphs else graphs.DISABLED
            settings.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER if loaded.is_eager else kernels.LAZY
            loaded.kernels.attach(settings)
        context = engine.create_execution_context(settings)
        if context is None:
            raise loaded.failure("cannot create an execution context")
        if self._scratch is not None:
            context.set_device_memory(int(self._scratch), self._scratch_size)
        if profile:
            try:
                context.set_optimization_profile_async(profile, self._stream.handle)
            except RuntimeError:  # the binding raises where the C++ call returns false
                raise loaded.failure(f"cannot select optimisation profile {profile}") from None
        for name, memory in ((INPUT, slot.input), (OUTPUT, slot.output)):
            if not context.set_tensor_address(name, int(memory)):
                raise loaded.failure(f"cannot set the address of '{name}'")
        return _ExecutionContext(context, settings)

    def _execute(self, execution: _ExecutionContext, size: int) -> None:
        assert self._stream is not None
        if execution.size != size:
            if not execution.context.set_input_shape(INPUT, (size, *self._engine.image)):
                raise self._engine.failure(f"cannot set a batch of {size}")
            execution.size = size
        if not execution.context.execute_async_v3(self._stream.handle):
            raise self._engine.failure("cannot run the engine")

    def _slot(self, index: int) -> _Slot:
        """Return a slot; the second one is allocated when a batch of several chunks first needs it."""
        while len(self._slots) <= index:
            engine, driver, rows = self._engine, self._driver, self._engine.max_batch
            kept = len(self._buffers)
            try:
                host_out = self._keep(driver.pinned((rows, engine.dim)))
                images = self._keep(driver.allocate(rows * engine.image_bytes))
                embeddings = self._keep(driver.allocate(rows * engine.row_bytes))
            except BaseException:
                while len(self._buffers) > kept:
                    driver.free(self._buffers.pop())
                raise
            loaded, done = self._create(driver.event), self._create(driver.event)
            self._slots.append(_Slot(len(self._slots), images, embeddings, host_out, loaded, done))
        return self._slots[index]

    def _drain(self) -> None:
        """Wait for work that still uses the caller's memory, after an error; a further error adds nothing."""
        for stream in filter(None, (self._copies, self._stream)):
            with suppress(Exception):
                self._driver.synchronise(stream)

    def _keep(self, buffer: Any) -> Any:
        """Register a buffer that ``close`` frees, and return it."""
        self._buffers.append(buffer)
        return buffer

    def _create(self, make: Callable[[], Any]) -> Any:
        """Create a stream or an event that ``close`` destroys."""
        self._streams_and_events.append(make())
        return self._streams_and_events[-1]
