"""Teachers and students run by PyTorch, eager or compiled."""

import os
import shutil
from dataclasses import dataclass
from typing import Any

from export.backends.base import INSTALL, explain_no_gpu, import_or_explain
from vpr.artifacts.store import Artifact
from vpr.retrieval.embeddings import Forward, torch_forward


@dataclass(frozen=True)
class TorchBackend:
    """Teachers and students by PyTorch."""

    name: str  # name in ``report.json``
    device: str  # ``cpu`` or ``cuda``
    compiled: bool  # use ``torch.compile``; the first call of a batch size then takes up to minutes
    kinds: tuple[str, ...] = ("teacher", "student")

    def missing(self) -> str | None:
        """See :class:`export.backends.base.Backend`."""
        torch, reason = import_or_explain("torch", INSTALL)
        if torch is None:
            return reason
        if self.device == "cuda" and not torch.cuda.is_available():
            return explain_no_gpu() or "PyTorch finds no CUDA device. Install its CUDA build."
        if self.device == "cpu" and self.compiled and not _has_compiler():
            return "needs a C++ compiler. Install g++, or name a compiler in CXX."
        return None

    def version(self) -> str:
        """See :class:`export.backends.base.Backend`."""
        import torch

        return f"{torch.__version__}; {torch.cuda.get_device_name() if self.device == 'cuda' else 'CPU'}"

    def precision(self, artifact: Artifact) -> str:
        """See :class:`export.backends.base.Backend`."""
        return "fp32"

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """See :class:`export.backends.base.Backend`."""
        import torch

        torch.set_num_threads(threads)
        model = load_module(artifact).to(self.device)
        return torch_forward(torch.compile(model) if self.compiled else model)


def load_module(artifact: Artifact) -> Any:
    """Load the network of a teacher or student artifact on the CPU, in evaluation mode."""
    if artifact.card.kind == "teacher":
        from teacher.model import load_teacher

        return load_teacher(artifact.path, artifact)[0]
    from student.model import load_student

    return load_student(artifact.path, artifact)[0]


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
