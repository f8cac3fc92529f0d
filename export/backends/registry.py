"""The backends by name, and every way to run an artifact."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.backends.base import Backend, BackendUnavailable
from export.backends.onnx_runtime import OnnxRuntimeBackend
from export.backends.openvino_runtime import OpenVinoBackend
from export.backends.pytorch import TorchBackend
from export.backends.tensorrt_engine import EngineBackend
from export.config import BACKEND_NAMES, CPU_BACKENDS, DEFAULT_BACKENDS, check_backends
from vpr.artifacts.card import Kind
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError
from vpr.common.hardware import available_cpus
from vpr.imaging.preprocess import ModelInput, Preprocess
from vpr.inference.onnx_session import CPU, CUDA, TENSORRT, TENSORRT_RTX
from vpr.retrieval.embeddings import Forward

MODEL_KINDS: tuple[Kind, ...] = ("teacher", "student", "onnx", "engine")
BACKENDS: tuple[Backend, ...] = (
    TorchBackend("torch", "cpu", compiled=False),
    TorchBackend("torch-compile", "cpu", compiled=True),
    TorchBackend("torch-cuda", "cuda", compiled=False),
    TorchBackend("torch-cuda-tf32", "cuda", compiled=False, dtype="tf32"),
    TorchBackend("torch-cuda-bf16", "cuda", compiled=False, dtype="bf16"),
    TorchBackend("torch-cuda-fp16", "cuda", compiled=False, dtype="fp16"),
    TorchBackend("torch-compile-cuda", "cuda", compiled=True),
    TorchBackend("torch-compile-cuda-tf32", "cuda", compiled=True, dtype="tf32"),
    TorchBackend("torch-compile-cuda-bf16", "cuda", compiled=True, dtype="bf16"),
    TorchBackend("torch-compile-cuda-fp16", "cuda", compiled=True, dtype="fp16"),
    OnnxRuntimeBackend("onnxruntime-cpu", CPU),
    OnnxRuntimeBackend("onnxruntime-cuda", CUDA),
    OnnxRuntimeBackend("onnxruntime-tensorrt", TENSORRT),
    OnnxRuntimeBackend("onnxruntime-tensorrt-rtx", TENSORRT_RTX),
    OpenVinoBackend(),
    EngineBackend("tensorrt"),
    EngineBackend("tensorrt-rtx"),
)


@dataclass(frozen=True)
class Model:
    """One artifact on one backend."""

    artifact: Artifact  # artifact to run
    runner: Backend  # backend that runs it

    @property
    def stage(self) -> str:
        """Artifact kind: teacher, student, onnx or engine."""
        return self.artifact.card.kind

    @property
    def backend(self) -> str:
        """Name of the backend in ``report.json``."""
        return self.runner.name

    @property
    def precision(self) -> str:
        """Precision of the arithmetic."""
        return self.runner.precision(self.artifact)

    @property
    def name(self) -> str:
        """Names of the artifact and the backend."""
        return f"{self.artifact.card.name} ({self.backend})"

    @property
    def runs_on_gpu(self) -> bool:
        """Whether the backend computes on a GPU."""
        return self.backend not in CPU_BACKENDS

    def open(self, threads: int) -> Forward:
        """Load the artifact for a number of threads; :class:`BackendUnavailable` if the backend cannot run here."""
        if reason := self.runner.missing():
            targets = self.artifact.card.metrics.get("targets")
            raise BackendUnavailable(f"built for {', '.join(targets)}: {reason}" if targets else reason)
        return self.runner.open(self.artifact, threads)

    def random_input(self, batch: int) -> ModelInput:
        """Return a batch of the model's input in the range of preprocessed images."""
        shape, random = (batch, *self.preprocess.input_shape), np.random.default_rng(0)
        if self.preprocess.dtype == "uint8":
            return random.integers(0, 256, shape, dtype=np.uint8)
        return random.normal(size=shape).astype(np.float32)

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing of the card; :class:`UserError` if the card has none."""
        if self.artifact.card.preprocess is None:
            raise UserError(f"{self.artifact.path}: the card has no preprocessing. Make the artifact again.")
        return self.artifact.card.preprocess


def models_of(source: Artifact | Path | str, backends: Sequence[str] = DEFAULT_BACKENDS) -> list[Model]:
    """List the ways to run an artifact of :data:`MODEL_KINDS`, including those that this machine cannot run.

    ``all`` means every backend. Only the builder's own runtime runs an engine. :class:`UserError` if no backend
    has one of the names.
    """
    selected = choose_backends(backends)
    artifact = source if isinstance(source, Artifact) else load_artifact(source, MODEL_KINDS)
    fitting = [backend for backend in selected if artifact.card.kind in backend.kinds]
    if artifact.card.kind == "engine":
        fitting = [backend for backend in fitting if backend.name == artifact.card.config["backend"]]
    return [Model(artifact, backend) for backend in fitting]


def choose_backends(names: Sequence[str]) -> list[Backend]:
    """Return the backends of these names, in the order of the report."""
    check_backends(names)
    selected = BACKEND_NAMES if "all" in names else names
    return [backend for backend in BACKENDS if backend.name in selected]


def default_threads() -> int:
    """Return the number of processors that this process may use."""
    return len(available_cpus())
