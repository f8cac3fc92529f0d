"""A thread's share of a loaded engine: execution contexts, a stream, buffers and CUDA graphs of its own."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.tensorrt.cuda_driver import Driver, DriverError, Stream
from export.tensorrt.profiles import Chunk, Profile, split_batch
from vpr.common.log import get_logger
from vpr.inference.onnx_session import INPUT, OUTPUT

log = get_logger(__name__)

_MOST_GRAPHS = 16
_FLOAT = np.dtype(np.float32).itemsize


@dataclass
class LoadedEngine:
    """A deserialised engine.

    Attributes:
        trt: the module it was loaded with.
        runtime: what loaded it.
        engine: TensorRT's ``ICudaEngine``.
        native_graphs: TensorRT-RTX captures CUDA graphs itself (kernels of a shape are compiled while it already
            runs, so only it knows when); TensorRT leaves it to the caller.
        profiles: the batches it takes.
        image: (3, size, size).
        dim: of the embeddings.
        errors: what TensorRT has logged.
    """

    trt: ModuleType
    runtime: Any
    engine: Any
    native_graphs: bool
    profiles: tuple[Profile, ...]
    image: tuple[int, ...]
    dim: int
    errors: list[str]

    @property
    def most(self) -> int:
        """The largest batch of one run."""
        return max(profile.most for profile in self.profiles)

    def failure(self, what: str) -> Exception:
        """What TensorRT refused, with its reason."""
        reason = " ".join(self.errors[-1].split())[:200] if self.errors else "no reason given"
        kind = MemoryError if "out of memory" in reason.lower() else DriverError
        return kind(f"{what} ({reason})")


@dataclass
class _Context:
    """An execution context, the batch it is set to, and what it must outlive it."""

    context: Any
    settings: Any
    size: int = 0


class ThreadContext:
    """Runs batches one after another; of one thread at a time, which holds ``busy``.

    A graph is captured at the second use of a batch size, from an execution context of its own: TensorRT's
    graphs belong to the state of the context they come from, so that one may not change its shape any more.
    The contexts share their scratch memory, since one stream runs them in turn.

    Args:
        plan: the engine.
        driver: the GPU it was loaded on.
        graphs: whether CUDA graphs are used.
    """

    def __init__(self, plan: LoadedEngine, driver: Driver, graphs: bool) -> None:
        self.busy = threading.Lock()
        self._plan, self._driver, self._graphs = plan, driver, graphs
        self._contexts: dict[int, _Context] = {}
        self._replays: dict[int, tuple[_Context, Any]] = {}
        self._uses: Counter[int] = Counter()
        self._held: list[Any] = []
        self._stream: Stream | None = driver.stream()
        try:
            self._host_in = self._hold(driver.pinned((plan.most, *plan.image)))
            self._host_out = self._hold(driver.pinned((plan.most, plan.dim)))
            self._input = self._hold(driver.allocate(_FLOAT * plan.most * math.prod(plan.image)))
            self._output = self._hold(driver.allocate(_FLOAT * plan.most * plan.dim))
            scratch = 0 if plan.native_graphs else int(plan.engine.device_memory_size_v2)
            self._scratch_size = scratch
            self._scratch = self._hold(driver.allocate(scratch)) if scratch else None
        except BaseException:
            self.close()
            raise

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, 3, size, size) float32 to (n, dim) float32, inside ``with driver.current()``."""
        driver, stream = self._driver, self._stream
        assert stream is not None
        found = np.empty((len(batch), self._plan.dim), np.float32)
        for piece in split_batch(len(batch), self._plan.profiles):
            rows = piece.stop - piece.start
            self._host_in[:rows] = batch[piece.start : piece.stop]
            self._host_in[rows : piece.size] = batch[piece.stop - 1]
            driver.copy_in(self._input, self._host_in[: piece.size], stream)
            self._enqueue(piece, stream)
            driver.copy_out(self._host_out[: piece.size], self._output, stream)
            driver.synchronise(stream)
            found[piece.start : piece.stop] = self._host_out[:rows]
            if self._graphs and not self._plan.native_graphs and self._uses[piece.size] == 2:
                self._capture(piece, stream)
        return found

    def close(self) -> None:
        """Free everything, inside ``with driver.current()``."""
        for _, graph in self._replays.values():
            self._driver.discard(graph)
        self._replays.clear()
        self._contexts.clear()
        while self._held:
            self._driver.free(self._held.pop())
        self._stream = None

    def _enqueue(self, piece: Chunk, stream: Stream) -> None:
        self._uses[piece.size] += 1
        if piece.size in self._replays:
            self._driver.launch(self._replays[piece.size][1], stream)
            return
        if piece.profile not in self._contexts:
            self._contexts[piece.profile] = self._context(piece.profile, stream)
        self._execute(self._contexts[piece.profile], piece.size, stream)

    def _capture(self, piece: Chunk, stream: Stream) -> None:
        """Make the graph of a batch size; where that fails, go on without graphs and say so."""
        if len(self._replays) == _MOST_GRAPHS:
            return
        try:
            own = self._context(piece.profile, stream)
            # What a new shape changes is done at the next run, and cannot be captured.
            self._execute(own, piece.size, stream)
            graph = self._driver.capture(stream, lambda: bool(own.context.execute_async_v3(stream.handle)))
            self._replays[piece.size] = (own, graph)
        except (DriverError, MemoryError) as error:
            self._graphs = False
            log.info(f"engine: runs without CUDA graphs from here on: {error}")
        finally:
            self._driver.synchronise(stream)

    def _context(self, profile: int, stream: Stream) -> _Context:
        """A new execution context, its tensors bound to this lane's buffers."""
        trt, engine = self._plan.trt, self._plan.engine
        settings: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._plan.native_graphs:
            settings = engine.create_runtime_config()
            strategies = trt.CudaGraphStrategy
            settings.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if self._graphs else strategies.DISABLED
        context = engine.create_execution_context(settings)
        if context is None:
            raise self._plan.failure("no execution context can be made")
        if self._scratch is not None:
            context.set_device_memory(int(self._scratch), self._scratch_size)
        if profile and not context.set_optimization_profile_async(profile, stream.handle):
            raise self._plan.failure(f"optimisation profile {profile} is refused")
        for name, memory in ((INPUT, self._input), (OUTPUT, self._output)):
            if not context.set_tensor_address(name, int(memory)):
                raise self._plan.failure(f"the address of '{name}' is refused")
        return _Context(context, settings)

    def _execute(self, own: _Context, size: int, stream: Stream) -> None:
        if own.size != size:
            if not own.context.set_input_shape(INPUT, (size, *self._plan.image)):
                raise self._plan.failure(f"a batch of {size} is refused")
            own.size = size
        if not own.context.execute_async_v3(stream.handle):
            raise self._plan.failure("the engine cannot be run")

    def _hold(self, memory: Any) -> Any:
        self._held.append(memory)
        return memory
