"""Engines on a GPU: ``with open_engine("runs/engine") as engine: embeddings = engine(batch)``.

Needs the engine's builder, and PyCUDA or cuda-bindings, but no torch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.tensorrt.bindings import error_logger, import_tensorrt
from export.tensorrt.compatibility import (
    check_compatible,
    engine_load_error,
    host_code_error,
    load_engine,
    rebuild_command,
)
from export.tensorrt.cuda_driver import FLOAT32, CudaDriver, DriverError, open_driver
from export.tensorrt.dlpack import read_device_tensor
from export.tensorrt.kernel_cache import find_kernel_cache
from export.tensorrt.profiles import Profile
from export.tensorrt.thread_context import LoadedEngine, ThreadContext
from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.imaging.preprocess import ModelInput
from vpr.inference.onnx_session import INPUT, OUTPUT

_DTYPES = {"FLOAT": np.float32, "UINT8": np.uint8}  # of the input, by TensorRT's name


def open_engine(
    path: Path | str,
    device: int = 0,
    graphs: bool = True,
    allow_host_code: bool = False,
    eager: bool = False,
    kernel_cache: Path | str = "",
) -> EngineRunner:
    """Load an ``engine`` artifact onto a GPU.

    Args:
        path: Engine artifact.
        device: Index of the GPU in CUDA's order.
        graphs: Replay CUDA graphs, one per batch size.
        allow_host_code: Also load engines built with ``--version-compatible``. They contain a library that runs
            on the CPU, so allow this only for engines that you built.
        eager: Let TensorRT-RTX compile the kernels of a batch size before it runs them. By default it runs slower
            fallback kernels meanwhile. TensorRT has compiled all kernels in the build.
        kernel_cache: File of the kernels that TensorRT-RTX has compiled, read if it exists and written by ``close``.
            Empty compiles them again in each process. ``auto`` is the file that commands use, see docs/gpu.md. Kernels
            are code for the GPU: name only files that you wrote.

    Raises:
        UserError: The builder, a CUDA driver package or a GPU is missing; the engine is damaged; or it was built for
            another GPU architecture, version or driver. The message ends with the command that rebuilds the engine.
    """
    return start_engine(load_engine(path), device, graphs, allow_host_code, eager, kernel_cache)


def start_engine(
    artifact: Artifact,
    device: int = 0,
    graphs: bool = True,
    allow_host_code: bool = False,
    eager: bool = False,
    kernel_cache: Path | str = "",
) -> EngineRunner:
    """Load an ``engine`` artifact that was read already; otherwise as :func:`open_engine`."""
    with reraise_as_artifact_error(artifact):
        backend = artifact.card.config["backend"]
    trt, driver = import_tensorrt(backend), open_driver(device)
    return EngineRunner(artifact, trt, driver, graphs, allow_host_code, eager, kernel_cache)


class EngineRunner:
    """An engine on a GPU: a function of batches that any number of threads may call.

    Each thread has its own execution contexts, streams and buffers, created at its first call. The next new thread
    takes over those of a thread that has ended. ``close`` frees everything, at the latest when the process ends.
    Arguments and errors are those of :func:`open_engine`.
    """

    def __init__(
        self,
        artifact: Artifact,
        trt: ModuleType,
        driver: CudaDriver,
        graphs: bool = True,
        allow_host_code: bool = False,
        eager: bool = False,
        kernel_cache: Path | str = "",
    ) -> None:
        self.artifact = artifact
        self._driver, self._graphs = driver, graphs
        self._contexts: dict[threading.Thread, ThreadContext] = {}
        self._lock = threading.Lock()
        with reraise_as_artifact_error(artifact):
            check_compatible(artifact, trt.__version__, driver.gpu)
            if artifact.card.config.get("version_compatible") and not allow_host_code:
                raise host_code_error(artifact)
        with self._gpu_current():
            self._engine = deserialise_engine(artifact, trt, driver)
        self._engine.is_eager = eager
        self._engine.kernels = find_kernel_cache(kernel_cache, artifact, trt.__version__, driver.gpu)
        self._release = weakref.finalize(self, _release, driver, self._engine, self._contexts, self._lock)

    def __call__(self, batch: ModelInput) -> NDArray[np.float32]:
        """Embed n images, preprocessed as the card says, such as (n, 3, size, size) float32, as (n, dim) float32.

        Larger batches than the engine's are split. :class:`UserError` for a wrong shape or dtype, no images, a closed
        engine, too little GPU memory, or a GPU that fails.
        """
        self._check_batch(batch)
        with self._gpu_current():
            context = self._thread_context()
            with context.lock:
                self._check_open()
                return context.run(batch)

    def embed_on_device(self, pixels: Any, embeddings: Any) -> None:
        """Embed images that are in the GPU's memory into memory of the GPU; returns when they are there.

        Work that other libraries have enqueued on the tensors is done before.

        Args:
            pixels: n images, as for a call with an array, as a tensor with ``__dlpack__``, such as one of PyTorch.
            embeddings: (n, dim) float32 tensor, likewise, which is overwritten.

        Raises:
            UserError: A tensor has another shape, dtype or device, or as for a call with an array.
        """
        self._check_open()
        with self._gpu_current():
            context = self._thread_context()
            with context.lock:
                self._check_open()
                device, handle, engine = self._driver.device, context.handle, self._engine
                source = read_device_tensor(INPUT, pixels, device, handle, engine.input_dtype)
                target = read_device_tensor(OUTPUT, embeddings, device, handle, FLOAT32)
                count = source.shape[0] if source.shape else 0
                for name, actual, expected in (
                    (INPUT, source.shape, (max(1, count), *engine.image)),
                    (OUTPUT, target.shape, (count, engine.dim)),
                ):
                    if actual != expected:
                        raise UserError(f"{name}: expected {expected} on the GPU, got {actual}.")
                context.run_on_device(source.address, target.address, count)

    def measure_on_device(self, batch: int, calls: int = 100) -> NDArray[np.float64]:
        """Return the GPU's milliseconds of executions of a batch, without copies and host: (calls,) float64.

        Errors are those of a call.
        """
        self._check_open()
        with self._gpu_current():
            context = self._thread_context()
            with context.lock:
                self._check_open()
                return context.measure(batch, calls)

    def close(self) -> None:
        """Free the engine after the calls in progress; a second call does nothing."""
        with self._gpu_current():
            self._release()

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_batch(self, batch: ModelInput) -> None:
        self._check_open()
        is_images = isinstance(batch, np.ndarray) and batch.ndim == 4 and batch.shape[1:] == self._engine.image
        dtype = self._engine.input_dtype
        if not is_images or not len(batch) or batch.dtype != dtype:
            actual = f"{getattr(batch, 'shape', None)} {getattr(batch, 'dtype', type(batch).__name__)}"
            shape = ", ".join(map(str, self._engine.image))
            raise UserError(f"{INPUT}: expected (n, {shape}) {dtype} with n of 1 or more, got {actual}.")

    def _check_open(self) -> None:
        if not self._release.alive:
            raise UserError(f"{self.artifact.path}: the engine is closed. Open it again.")

    def _thread_context(self) -> ThreadContext:
        """Return the calling thread's context; take over that of an ended thread, or create one."""
        thread = threading.current_thread()
        with self._lock:
            if thread not in self._contexts:
                self._check_open()
                ended = next((other for other in self._contexts if not other.is_alive()), None)
                if ended is None:
                    self._contexts[thread] = ThreadContext(self._engine, self._driver, self._graphs)
                else:
                    self._contexts[thread] = self._contexts.pop(ended)
            return self._contexts[thread]

    @contextmanager
    def _gpu_current(self) -> Iterator[None]:
        """Make the GPU current in this thread; raise its failures as :class:`UserError`."""
        try:
            with self._driver.current():
                yield
        except MemoryError as error:
            config = self.artifact.card.config
            max_batch = max(int(config["max_batch"]), *config.get("batches", ()), 1)
            smaller: dict[str, Any] = {"max_batch": max(1, max_batch // 2), "batches": ()}
            for key in ("opt_batch", "min_batch"):
                smaller[key] = min(int(config[key]), smaller["max_batch"])
            problem = f"{self._driver.gpu.name} has too little free memory for batches of {max_batch} ({error})"
            remedy = f"Free GPU memory, or rebuild for smaller batches: {rebuild_command(self.artifact, **smaller)}"
            raise UserError(f"{self.artifact.path}: {problem}. {remedy}") from None
        except DriverError as error:
            remedy = f"Run the command again. If it fails again, rebuild: {rebuild_command(self.artifact)}"
            raise UserError(f"{self.artifact.path}: {error}. {remedy}") from None


def deserialise_engine(artifact: Artifact, trt: ModuleType, driver: CudaDriver) -> LoadedEngine:
    """Deserialise an engine, inside ``with driver.current()``; :class:`UserError` if TensorRT cannot load it."""
    errors: list[str] = []
    try:
        runtime = trt.Runtime(error_logger(trt, errors))
    except TypeError as error:  # the bindings raise it if TensorRT cannot create a runtime
        raise engine_load_error(artifact, trt.__version__, driver.cuda, errors or [str(error)]) from None
    runtime.engine_host_code_allowed = bool(artifact.card.config.get("version_compatible"))
    engine = runtime.deserialize_cuda_engine(artifact.file("engine.plan").read_bytes())
    if engine is None:
        raise engine_load_error(artifact, trt.__version__, driver.cuda, errors)
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    if names != {INPUT, OUTPUT}:
        tensors, rebuild = ", ".join(sorted(names)), rebuild_command(artifact)
        raise UserError(f"{artifact.path}: expected tensors {INPUT} and {OUTPUT}, got {tensors}. Rebuild: {rebuild}")
    dtype, output = (engine.get_tensor_dtype(name).name for name in (INPUT, OUTPUT))
    if dtype not in _DTYPES or output != "FLOAT":
        problem = f"expected {INPUT} of FLOAT or UINT8 and {OUTPUT} of FLOAT, got {dtype} and {output}"
        raise UserError(f"{artifact.path}: {problem}. Rebuild: {rebuild_command(artifact)}")
    ranges = [engine.get_tensor_profile_shape(INPUT, index) for index in range(engine.num_optimization_profiles)]
    return LoadedEngine(
        trt=trt,
        runtime=runtime,
        engine=engine,
        native_graphs=artifact.card.config["backend"] == "tensorrt-rtx",
        profiles=tuple(Profile(index, *(int(shape[0]) for shape in shapes)) for index, shapes in enumerate(ranges)),
        image=tuple(engine.get_tensor_shape(INPUT))[1:],
        input_dtype=np.dtype(_DTYPES[dtype]),
        dim=int(engine.get_tensor_shape(OUTPUT)[1]),
        errors=errors,
    )


def _release(
    driver: CudaDriver, engine: LoadedEngine, contexts: dict[threading.Thread, ThreadContext], lock: threading.Lock
) -> None:
    with driver.current(), lock:
        for context in list(contexts.values()):
            with context.lock:
                context.close()
        contexts.clear()
        try:
            engine.kernels.save()
        finally:
            engine.kernels.release()
            engine.engine = engine.runtime = None
