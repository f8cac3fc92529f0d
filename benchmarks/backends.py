"""What can run a model: one small protocol, and for what cannot run here the reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.cpu import openvino_forward
from export.onnx_graph import load_onnx
from export.runner import open_engine
from vpr.artifact import Artifact, load_artifact, reading
from vpr.embeddings import Forward, torch_forward
from vpr.environment import available_cpus, read_gpus
from vpr.errors import UserError
from vpr.graphs import INPUT, OUTPUT, GraphSession, load_graph


class BackendUnavailable(Exception):
    """This backend cannot run here; the message says why and what would help."""


@dataclass(frozen=True)
class Model:
    """One way to run one artifact.

    Attributes:
        artifact: what is run.
        stage: teacher, student, onnx or engine.
        backend: what runs it, by the names of ``report.json``.
        precision: of its arithmetic.
        open: loads it for a number of threads; raises :class:`BackendUnavailable`.
    """

    artifact: Artifact
    stage: str
    backend: str
    precision: str
    open: Callable[[int], Forward]

    @property
    def name(self) -> str:
        """Artifact and backend."""
        return f"{self.artifact.card.name} ({self.backend})"


def models_of(path: Path | str) -> list[Model]:
    """Every backend that an artifact has, whether or not it runs here."""
    artifact = load_artifact(path, ("teacher", "student", "onnx", "engine"))
    kind = artifact.card.kind
    precision = str(artifact.card.config.get("precision", "fp32"))
    if kind == "engine":
        built = artifact.card.metrics
        backend = str(artifact.card.config["backend"])
        return [Model(artifact, "engine", backend, str(built["precision"]), lambda _: _open_engine(artifact))]
    if kind == "onnx":
        return [
            Model(artifact, "onnx", "onnxruntime-cpu", precision, lambda threads: _open_onnxruntime(path, threads)),
            Model(artifact, "onnx", "openvino", precision, lambda threads: _open_openvino(artifact, threads)),
        ]
    return [Model(artifact, kind, "torch", "fp32", lambda threads: _open_torch(path, kind, threads))]


def default_threads() -> int:
    """One per processor this process may use."""
    return len(available_cpus())


def _open_torch(path: Path | str, kind: str, threads: int) -> Forward:
    import torch

    from student.model import load_student
    from teacher.model import load_teacher

    torch.set_num_threads(threads)
    model = load_teacher(path)[0] if kind == "teacher" else load_student(path)[0]
    return torch_forward(model)


def _open_onnxruntime(path: Path | str, threads: int) -> Forward:
    graph, artifact = load_onnx(path)
    with reading(artifact):
        runner = GraphSession(graph, threads)
    return _named(artifact, lambda batch: runner.run([OUTPUT], {INPUT: batch})[0])


def _open_openvino(artifact: Artifact, threads: int) -> Forward:
    try:
        importlib.import_module("openvino")
    except ImportError as error:
        raise BackendUnavailable(f"openvino cannot be loaded ({error}): pip install -r requirements.txt") from None
    with reading(artifact):
        return _named(artifact, openvino_forward(load_graph(artifact), threads))


def _named(artifact: Artifact, forward: Forward) -> Forward:
    """The same function, whose refusals name the artifact."""

    def named(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with reading(artifact):
            return forward(batch)

    return named


def _open_engine(artifact: Artifact) -> Forward:
    targets = ", ".join(artifact.card.metrics["targets"])
    gpus, _ = read_gpus()
    if not gpus:
        raise BackendUnavailable(f"built for {targets}: running it needs such an NVIDIA GPU, this machine has none")
    try:
        return open_engine(artifact.path)
    except UserError as error:
        raise BackendUnavailable(str(error)) from None
