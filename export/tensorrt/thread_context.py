"""One thread's share of a loaded engine: execution contexts, stream, buffers and CUDA graphs."""

import math
import threading
from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.tensorrt.cuda_driver import DriverError, PyCudaDriver
from export.tensorrt.profiles import Chunk, Profile, split_batch
from vpr.common.log import get_logger
from vpr.imaging.preprocess import ModelInput
from vpr.inference.onnx_session import INPUT, OUTPUT

log = get_logger(__name__)

_MAX_GRAPHS = 16
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

    @property
    def max_batch(self) -> int:
        """Largest batch of one execution."""
        return max(profile.max_batch for profile in self.profiles)

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


class ThreadContext:
    """Runs batches in sequence; one thread at a time uses it and holds ``lock``.

    The second use of a batch size captures a CUDA graph, if ``graphs``. Each graph has its own execution context,
    because a graph belongs to the state of its context and that context must not change its shape any more. All
    contexts share their scratch memory, because one stream runs them in turn.
    """

    def __init__(self, engine: LoadedEngine, driver: PyCudaDriver, graphs: bool) -> None:
        self.lock = threading.Lock()
        self._engine, self._driver, self._graphs = engine, driver, graphs
        self._contexts: dict[int, _ExecutionContext] = {}
        self._replays: dict[int, tuple[_ExecutionContext, Any]] = {}
        self._uses: Counter[int] = Counter()
        self._buffers: list[Any] = []
        self._stream: Any | None = driver.stream()
        image_bytes = engine.input_dtype.itemsize * math.prod(engine.image)
        try:
            self._host_in = self._keep(driver.pinned((engine.max_batch, *engine.image), engine.input_dtype))
            self._host_out = self._keep(driver.pinned((engine.max_batch, engine.dim), np.dtype(np.float32)))
            self._input = self._keep(driver.allocate(engine.max_batch * image_bytes))
            self._output = self._keep(driver.allocate(_FLOAT_BYTES * engine.max_batch * engine.dim))
            self._scratch_size = 0 if engine.native_graphs else int(engine.engine.device_memory_size_v2)
            self._scratch = self._keep(driver.allocate(self._scratch_size)) if self._scratch_size else None
        except BaseException:
            self.close()
            raise

    def run(self, batch: ModelInput) -> NDArray[np.float32]:
        """Embed n images of the engine's input as (n, dim) float32, inside ``with driver.current()``."""
        driver, stream = self._driver, self._stream
        assert stream is not None
        embeddings = np.empty((len(batch), self._engine.dim), np.float32)
        for chunk in split_batch(len(batch), self._engine.profiles):
            rows = chunk.stop - chunk.start
            self._host_in[:rows] = batch[chunk.start : chunk.stop]
            self._host_in[rows : chunk.size] = batch[chunk.stop - 1]
            driver.copy_in(self._input, self._host_in[: chunk.size], stream)
            self._enqueue(chunk, stream)
            driver.copy_out(self._host_out[: chunk.size], self._output, stream)
            driver.synchronise(stream)
            embeddings[chunk.start : chunk.stop] = self._host_out[:rows]
            if self._graphs and not self._engine.native_graphs and self._uses[chunk.size] == 2:
                self._capture(chunk, stream)
        return embeddings

    def close(self) -> None:
        """Free graphs, contexts and buffers, inside ``with driver.current()``."""
        for _, graph in self._replays.values():
            self._driver.discard(graph)
        self._replays.clear()
        self._contexts.clear()
        while self._buffers:
            self._driver.free(self._buffers.pop())
        self._stream = None

    def _enqueue(self, chunk: Chunk, stream: Any) -> None:
        self._uses[chunk.size] += 1
        if chunk.size in self._replays:
            self._driver.launch(self._replays[chunk.size][1], stream)
            return
        if chunk.profile not in self._contexts:
            self._contexts[chunk.profile] = self._create_context(chunk.profile, stream)
        self._execute(self._contexts[chunk.profile], chunk.size, stream)

    def _capture(self, chunk: Chunk, stream: Any) -> None:
        """Capture the graph of a batch size; if that fails, continue without graphs and log a warning."""
        if len(self._replays) == _MAX_GRAPHS:
            return
        try:
            execution = self._create_context(chunk.profile, stream)
            # The first execution of a new shape does work that cannot be captured.
            self._execute(execution, chunk.size, stream)
            graph = self._driver.capture(stream, lambda: bool(execution.context.execute_async_v3(stream.handle)))
            self._replays[chunk.size] = (execution, graph)
        except (DriverError, MemoryError) as error:
            self._graphs = False
            log.warning(f"engine: continues without CUDA graphs ({error})")
        finally:
            self._driver.synchronise(stream)

    def _create_context(self, profile: int, stream: Any) -> _ExecutionContext:
        """Create an execution context whose tensors use this thread's buffers."""
        trt, engine = self._engine.trt, self._engine.engine
        settings: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._engine.native_graphs:
            settings = engine.create_runtime_config()
            strategies = trt.CudaGraphStrategy
            settings.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if self._graphs else strategies.DISABLED
        context = engine.create_execution_context(settings)
        if context is None:
            raise self._engine.failure("cannot create an execution context")
        if self._scratch is not None:
            context.set_device_memory(int(self._scratch), self._scratch_size)
        if profile and not context.set_optimization_profile_async(profile, stream.handle):
            raise self._engine.failure(f"cannot select optimisation profile {profile}")
        for name, memory in ((INPUT, self._input), (OUTPUT, self._output)):
            if not context.set_tensor_address(name, int(memory)):
                raise self._engine.failure(f"cannot set the address of '{name}'")
        return _ExecutionContext(context, settings)

    def _execute(self, execution: _ExecutionContext, size: int, stream: Any) -> None:
        if execution.size != size:
            if not execution.context.set_input_shape(INPUT, (size, *self._engine.image)):
                raise self._engine.failure(f"cannot set a batch of {size}")
            execution.size = size
        if not execution.context.execute_async_v3(stream.handle):
            raise self._engine.failure("cannot run the engine")

    def _keep(self, buffer: Any) -> Any:
        """Register a buffer that ``close`` frees, and return it."""
        self._buffers.append(buffer)
        return buffer
