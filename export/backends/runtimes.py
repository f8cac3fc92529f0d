"""What can run a model: one small protocol, its implementations, and the reason where one cannot run here."""

from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.common.hardware import lacks_vnni, read_gpus
from vpr.common.telemetry import disable_telemetry
from vpr.inference.onnx_session import CPU, INPUT, OUTPUT, TENSORRT_RTX, ProviderMissing, rtx_devices
from vpr.retrieval.embeddings import Forward, torch_forward

_INSTALL = "pip install -r requirements.txt"
_INSTALL_GPU = "pip install -r requirements-gpu.txt"
_NO_GPU = "needs an NVIDIA GPU, this machine has none"


class BackendUnavailable(Exception):
    """This backend cannot run here; the message says why and what would help."""


class Backend(Protocol):
    """Something that runs artifacts."""

    @property
    def name(self) -> str:
        """As in ``report.json``."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The artifacts it runs."""

    def missing(self) -> str | None:
        """What it needs that this machine lacks, and the remedy; None if it can run."""

    def version(self) -> str:
        """Of what runs, where nothing is missing."""

    def precision(self, artifact: Artifact) -> str:
        """Of the arithmetic it is asked for."""

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """Load an artifact and get it ready to embed; :class:`BackendUnavailable` where it does not fit."""


@dataclass(frozen=True)
class TorchBackend:
    """Teachers and students by PyTorch, eager or compiled.

    Attributes:
        name: as in ``report.json``.
        device: ``cpu`` or ``cuda``.
        compiled: by ``torch.compile``, which takes up to minutes at the first call of a batch size.
    """

    name: str
    device: str
    compiled: bool
    kinds: tuple[str, ...] = ("teacher", "student")

    def missing(self) -> str | None:
        """See :class:`Backend`."""
        torch, reason = _load("torch", _INSTALL)
        if torch is None:
            return reason
        if self.device == "cuda":
            return None if torch.cuda.is_available() else _NO_GPU
        if self.compiled and not _find_compiler():
            return "needs a C++ compiler: install g++, or name one in CXX"
        return None

    def version(self) -> str:
        """See :class:`Backend`."""
        import torch

        return f"{torch.__version__}; {torch.cuda.get_device_name() if self.device == 'cuda' else 'CPU'}"

    def precision(self, artifact: Artifact) -> str:
        """See :class:`Backend`."""
        return "fp32"

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """See :class:`Backend`."""
        import torch

        torch.set_num_threads(threads)
        model = load_module(artifact).to(self.device)
        return torch_forward(torch.compile(model) if self.compiled else model)


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """Graphs by one of ONNX Runtime's execution providers.

    Attributes:
        name: as in ``report.json``.
        provider: ONNX Runtime's name of it.
    """

    name: str
    provider: str
    kinds: tuple[str, ...] = ("onnx",)

    def missing(self) -> str | None:
        """See :class:`Backend`."""
        runtime, reason = _load("onnxruntime", _INSTALL)
        if runtime is None or self.provider == CPU:
            return reason
        if self.provider == TENSORRT_RTX:
            wheel, reason = _load("onnxruntime_ep_nv_tensorrt_rtx", _INSTALL)
            if wheel is None:
                return reason
        elif self.provider not in runtime.get_available_providers():
            return f"this build of ONNX Runtime has no {self.provider}: {_INSTALL}"
        if not read_gpus()[0]:
            return _NO_GPU
        if self.provider == TENSORRT_RTX:
            try:
                return None if rtx_devices() else "TensorRT-RTX finds no GPU that it supports: see 'nvidia-smi'"
            except Exception as error:  # ONNX Runtime raises classes of its own that have no common base
                return f"the plugin cannot be loaded ({_line(error)}): {_INSTALL}"
        return None

    def version(self) -> str:
        """See :class:`Backend`."""
        return str(importlib.import_module("onnxruntime").__version__)

    def precision(self, artifact: Artifact) -> str:
        """See :class:`Backend`."""
        return str(artifact.card.config.get("precision", "fp32"))

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """See :class:`Backend`."""
        from vpr.inference.onnx_graph import GraphSession, load_graph

        graph = load_graph(artifact)
        try:
            session = GraphSession(graph, threads, self.provider)
        except ProviderMissing as error:
            raise BackendUnavailable(str(error)) from None
        except UserError as error:
            raise UserError(f"{artifact.path}: {error}") from None
        return _named(artifact, lambda batch: session.run([OUTPUT], {INPUT: batch})[0])


@dataclass(frozen=True)
class OpenVinoBackend:
    """Graphs by OpenVINO on the CPU."""

    name: str = "openvino"
    kinds: tuple[str, ...] = ("onnx",)

    def missing(self) -> str | None:
        """See :class:`Backend`."""
        return _load("openvino", _INSTALL)[1]

    def version(self) -> str:
        """See :class:`Backend`."""
        openvino = importlib.import_module("openvino")
        overflows = "; its INT8 overflows: no VNNI is seen here" if lacks_vnni() else ""
        return f"{openvino.__version__.split('-')[0]}; {', '.join(openvino.Core().available_devices)}{overflows}"

    def precision(self, artifact: Artifact) -> str:
        """See :class:`Backend`."""
        return str(artifact.card.config.get("precision", "fp32"))

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """See :class:`Backend`."""
        from export.backends.openvino_session import openvino_forward
        from vpr.inference.onnx_graph import load_graph

        with reraise_as_artifact_error(artifact):
            return _named(artifact, openvino_forward(load_graph(artifact), threads))


@dataclass(frozen=True)
class EngineBackend:
    """Engines by PyCUDA and the builder's own runtime, with CUDA graphs.

    Attributes:
        name: ``tensorrt`` or ``tensorrt-rtx``: the builder.
    """

    name: str
    kinds: tuple[str, ...] = ("engine",)

    def missing(self) -> str | None:
        """See :class:`Backend`."""
        from export.tensorrt.bindings import import_tensorrt

        try:
            import_tensorrt("tensorrt" if self.name == "tensorrt" else "tensorrt-rtx")
        except UserError as error:
            return str(error)
        return _load("pycuda.driver", _INSTALL_GPU)[1] if read_gpus()[0] else _NO_GPU

    def version(self) -> str:
        """See :class:`Backend`."""
        from export.tensorrt.bindings import import_tensorrt

        return str(import_tensorrt("tensorrt" if self.name == "tensorrt" else "tensorrt-rtx").__version__)

    def precision(self, artifact: Artifact) -> str:
        """See :class:`Backend`."""
        precision = artifact.card.metrics.get("precision")
        if not isinstance(precision, str):
            raise UserError(f"{artifact.path}: its card does not say its precision: build the engine again")
        return precision

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """See :class:`Backend`."""
        from export.tensorrt.runner import open_engine

        try:
            return open_engine(artifact.path)
        except UserError as error:
            raise BackendUnavailable(str(error)) from None


def load_module(artifact: Artifact) -> Any:
    """The network of a teacher or student artifact, in evaluation mode on the CPU."""
    if artifact.card.kind == "teacher":
        from teacher.model import load_teacher

        return load_teacher(artifact.path)[0].eval()
    from student.model import load_student

    return load_student(artifact.path)[0]


def _named(artifact: Artifact, forward: Forward) -> Forward:
    """The same function, whose refusals name the artifact."""

    def named(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with reraise_as_artifact_error(artifact):
            return forward(batch)

    return named


def _load(package: str, remedy: str) -> tuple[Any, str | None]:
    """A package, or None and the reason why it does not load."""
    disable_telemetry()
    try:
        return importlib.import_module(package), None
    except (ImportError, OSError) as error:
        return None, f"{package} cannot be loaded ({_line(error)}): {remedy}"


def _find_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
