"""Running an engine: ``with open_engine("runs/engine") as engine: embeddings = engine(batch)``.

PyCUDA and the engine's own builder are all it needs; there is no torch in it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType

import numpy as np
from numpy.typing import NDArray

from export.tensorrt.bindings import error_logger, import_tensorrt
from export.tensorrt.compatibility import check_compatible, engine_load_error, load_engine, rebuild_command
from export.tensorrt.cuda_driver import Driver, DriverError, PyCudaDriver
from export.tensorrt.profiles import Profile
from export.tensorrt.thread_context import LoadedEngine, ThreadContext
from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.inference.onnx_session import INPUT, OUTPUT


def open_engine(path: Path | str, device: int = 0, graphs: bool = True, allow_host_code: bool = False) -> EngineRunner:
    """Load an ``engine`` artifact onto a GPU.

    Args:
        path: the artifact.
        device: number of the GPU, by CUDA's order.
        graphs: replay CUDA graphs, one per batch size.
        allow_host_code: load engines built with ``--version-compatible`` too. They carry a library that
            runs on the CPU: allow it for what you built yourself.

    Raises:
        UserError: PyCUDA, the builder or a GPU is missing; the engine is damaged, or is of another GPU
            architecture, version or driver. The line ends with the command that rebuilds it.
    """
    artifact = load_engine(path)
    with reraise_as_artifact_error(artifact):
        backend = artifact.card.config["backend"]
    return EngineRunner(artifact, import_tensorrt(backend), PyCudaDriver(device), graphs, allow_host_code)


class EngineRunner:
    """An engine on a GPU: a function of batches, for any number of threads.

    Each thread has execution contexts, a stream and buffers of its own, made at its first call; a thread that
    has ended leaves them to the next. Everything is freed by ``close``, at the latest when the process ends.

    Args:
        artifact: of kind ``engine``.
        trt: the module of its backend.
        driver: the GPU.
        graphs: replay CUDA graphs, one per batch size.
        allow_host_code: as :func:`open_engine` has it.

    Raises:
        UserError: as :func:`open_engine` does.
    """

    def __init__(
        self, artifact: Artifact, trt: ModuleType, driver: Driver, graphs: bool = True, allow_host_code: bool = False
    ) -> None:
        self.artifact = artifact
        self._driver, self._graphs = driver, graphs
        self._lanes: dict[threading.Thread, ThreadContext] = {}
        self._lock = threading.Lock()
        with reraise_as_artifact_error(artifact):
            check_compatible(artifact, trt.__version__, driver.gpu)
            if artifact.card.config.get("version_compatible") and not allow_host_code:
                raise UserError(f"{artifact.path}: carries a library: open it with allow_host_code=True if it is yours")
        with self._calling():
            self._plan = load_plan(artifact, trt, driver)
        self._release = weakref.finalize(self, _release, driver, self._plan, self._lanes, self._lock)

    def __call__(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed images.

        Args:
            batch: (n, 3, size, size) float32, preprocessed as the card says, any n from 1; more than the engine takes
                at once are run in pieces.

        Returns:
            (n, dim) float32.

        Raises:
            UserError: another shape or dtype, a closed engine, too little GPU memory, or a GPU that fails.
        """
        self._check(batch)
        with self._calling():
            lane = self._lane()
            with lane.busy:
                self._check_open()
                return lane.run(batch)

    def close(self) -> None:
        """Free the engine once the calls under way have ended; again is harmless."""
        with self._calling():
            self._release()

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, batch: NDArray[np.float32]) -> None:
        self._check_open()
        found = f"{getattr(batch, 'shape', None)} {getattr(batch, 'dtype', type(batch).__name__)}"
        good = isinstance(batch, np.ndarray) and batch.ndim == 4 and batch.shape[1:] == self._plan.image
        if not good or not len(batch) or batch.dtype != np.float32:
            wanted = ", ".join(map(str, self._plan.image))
            raise UserError(f"{INPUT}: {found}: give (n, {wanted}) float32, n at least 1")

    def _check_open(self) -> None:
        if not self._release.alive:
            raise UserError(f"{self.artifact.path}: the engine is closed: open it again")

    def _lane(self) -> ThreadContext:
        me = threading.current_thread()
        with self._lock:
            if me not in self._lanes:
                self._check_open()
                ended = next((thread for thread in self._lanes if not thread.is_alive()), None)
                own = ThreadContext(self._plan, self._driver, self._graphs) if ended is None else self._lanes.pop(ended)
                self._lanes[me] = own
            return self._lanes[me]

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Inside it the GPU is this thread's; what it refuses becomes one line."""
        try:
            with self._driver.current():
                yield
        except MemoryError as error:
            most = int(self.artifact.card.config["max_batch"])
            smaller = {"max_batch": max(1, most // 2)}
            for key in ("opt_batch", "min_batch"):
                smaller[key] = min(int(self.artifact.card.config[key]), smaller["max_batch"])
            command = rebuild_command(self.artifact, **smaller)
            raise UserError(
                f"{self.artifact.path}: {self._driver.gpu.name} has too little free memory for batches of {most} "
                f"({error}): end what else uses it, or rebuild for smaller batches: {command}"
            ) from None
        except DriverError as error:
            raise UserError(
                f"{self.artifact.path}: {error}: run it again, and if it stays so rebuild it: "
                f"{rebuild_command(self.artifact)}"
            ) from None


def load_plan(artifact: Artifact, trt: ModuleType, driver: Driver) -> LoadedEngine:
    """Deserialise an engine, inside ``with driver.current()``.

    Raises:
        UserError: TensorRT refuses it, or its tensors are not those of our exports.
    """
    errors: list[str] = []
    try:
        runtime = trt.Runtime(error_logger(trt, errors))
    except TypeError as error:  # the bindings' word for a runtime that could not be made
        raise engine_load_error(artifact, trt.__version__, driver.cuda, errors or [str(error)]) from None
    runtime.engine_host_code_allowed = bool(artifact.card.config.get("version_compatible"))
    engine = runtime.deserialize_cuda_engine(artifact.file("engine.plan").read_bytes())
    if engine is None:
        raise engine_load_error(artifact, trt.__version__, driver.cuda, errors)
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    if names != {INPUT, OUTPUT}:
        raise UserError(
            f"{artifact.path}: has tensors {', '.join(sorted(names))} where {INPUT}, {OUTPUT} are needed: "
            f"{rebuild_command(artifact)}"
        )
    ranges = [engine.get_tensor_profile_shape(INPUT, index) for index in range(engine.num_optimization_profiles)]
    return LoadedEngine(
        trt=trt,
        runtime=runtime,
        engine=engine,
        native_graphs=artifact.card.config["backend"] == "tensorrt-rtx",
        profiles=tuple(Profile(index, *(int(shape[0]) for shape in shapes)) for index, shapes in enumerate(ranges)),
        image=tuple(engine.get_tensor_shape(INPUT))[1:],
        dim=int(engine.get_tensor_shape(OUTPUT)[1]),
        errors=errors,
    )


def _release(
    driver: Driver, plan: LoadedEngine, lanes: dict[threading.Thread, ThreadContext], lock: threading.Lock
) -> None:
    with driver.current(), lock:
        for lane in list(lanes.values()):
            with lane.busy:
                lane.close()
        lanes.clear()
        plan.engine = plan.runtime = None
