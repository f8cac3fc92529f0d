"""The backends by name, and which of them an artifact has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.backends.runtimes import (
    Backend,
    BackendUnavailable,
    EngineBackend,
    OnnxRuntimeBackend,
    OpenVinoBackend,
    TorchBackend,
)
from export.config import BACKEND_NAMES as NAMES
from export.config import USUAL_BACKENDS as USUAL
from export.config import check_backends
from vpr.artifacts.store import Artifact, Kind, load_artifact
from vpr.common.errors import UserError
from vpr.common.hardware import available_cpus
from vpr.imaging.decode import Preprocess
from vpr.inference.onnx_session import CPU, CUDA, TENSORRT, TENSORRT_RTX
from vpr.retrieval.embeddings import Forward

MODEL_KINDS: tuple[Kind, ...] = ("teacher", "student", "onnx", "engine")
BACKENDS: tuple[Backend, ...] = (
    TorchBackend("torch", "cpu", compiled=False),
    TorchBackend("torch-compile", "cpu", compiled=True),
    TorchBackend("torch-cuda", "cuda", compiled=False),
    TorchBackend("torch-compile-cuda", "cuda", compiled=True),
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
    """One way to run one artifact.

    Attributes:
        artifact: what is run.
        runner: what runs it.
    """

    artifact: Artifact
    runner: Backend

    @property
    def stage(self) -> str:
        """Teacher, student, onnx or engine."""
        return self.artifact.card.kind

    @property
    def backend(self) -> str:
        """What runs it, by the names of ``report.json``."""
        return self.runner.name

    @property
    def precision(self) -> str:
        """Of its arithmetic."""
        return self.runner.precision(self.artifact)

    @property
    def name(self) -> str:
        """Artifact and backend."""
        return f"{self.artifact.card.name} ({self.backend})"

    def open(self, threads: int) -> Forward:
        """Load it for a number of threads.

        Raises:
            BackendUnavailable: it cannot run here.
        """
        if reason := self.runner.missing():
            targets = self.artifact.card.metrics.get("targets")
            raise BackendUnavailable(f"built for {', '.join(targets)}: {reason}" if targets else reason)
        return self.runner.open(self.artifact, threads)

    def random_input(self, batch: int) -> NDArray[np.float32]:
        """(batch, 3, size, size) float32 in the range of preprocessed images."""
        size = self.preprocess.size
        return np.random.default_rng(0).normal(size=(batch, 3, size, size)).astype(np.float32)

    @property
    def preprocess(self) -> Preprocess:
        """The card's; :class:`UserError` where it has none."""
        if self.artifact.card.preprocess is None:
            raise UserError(f"{self.artifact.path}: its card has no preprocessing: make the artifact again")
        return self.artifact.card.preprocess


def models_of(source: Artifact | Path | str, backends: Sequence[str] = USUAL) -> list[Model]:
    """Every way to run an artifact, whether or not it can be run here.

    Args:
        source: Artifact of :data:`MODEL_KINDS`, or its path. An engine is run by its own builder's runtime.
        backends: names of those considered; ``all`` is every one.

    Raises:
        UserError: there is no backend of that name.
    """
    chosen = choose_backends(backends)
    artifact = source if isinstance(source, Artifact) else load_artifact(source, MODEL_KINDS)
    fitting = [backend for backend in chosen if artifact.card.kind in backend.kinds]
    if artifact.card.kind == "engine":
        fitting = [backend for backend in fitting if backend.name == artifact.card.config["backend"]]
    return [Model(artifact, backend) for backend in fitting]


def choose_backends(names: Sequence[str]) -> list[Backend]:
    """Backends by name, in the order of the list."""
    check_backends(names)
    wanted = NAMES if "all" in names else names
    return [backend for backend in BACKENDS if backend.name in wanted]


def default_threads() -> int:
    """One per processor this process may use."""
    return len(available_cpus())
