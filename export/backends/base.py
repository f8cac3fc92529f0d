"""The protocol of a backend, and the checks and error handling that all backends share."""

import importlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.common.gpus import VisibleGpu, list_gpus
from vpr.common.hardware import read_gpus
from vpr.common.telemetry import disable_telemetry
from vpr.imaging.preprocess import ModelInput
from vpr.retrieval.embeddings import Forward

INSTALL = "Run `pip install -r requirements.txt`."


class BackendUnavailable(UserError):
    """This backend cannot run here. The message says why and how to fix it."""


class RunFailed(UserError):
    """A backend has loaded a model and cannot run it. The message names the artifact and the reason."""


class Backend(Protocol):
    """A library, on a device, that runs artifacts."""

    @property
    def name(self) -> str:
        """Name in ``report.json``."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Artifact kinds that the backend runs."""

    def missing(self) -> str | None:
        """Return what this machine lacks and how to install it, or None if the backend can run."""

    def version(self) -> str:
        """Return the version and device of a backend that misses nothing."""

    def precision(self, artifact: Artifact) -> str:
        """Return the requested precision of the arithmetic."""

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """Load an artifact as an embedding function; :class:`BackendUnavailable` if it cannot run here."""


def import_or_explain(package: str, remedy: str) -> tuple[Any, str | None]:
    """Return the imported package and None, or None and the reason why the import fails."""
    disable_telemetry()
    try:
        return importlib.import_module(package), None
    except (ImportError, OSError) as error:
        return None, f"{package} cannot be loaded ({single_line(error)}). {remedy}"


def explain_no_gpu() -> str | None:
    """Return the reason if this machine has no NVIDIA GPU, else None."""
    if read_gpus()[0]:
        return None
    return f"needs an NVIDIA GPU; this machine {list_gpus().problem or 'has none'}"


def first_gpu() -> VisibleGpu | None:
    """Return the GPU that every backend uses, or None: the first one that CUDA lists (see ``--device``)."""
    return next(iter(list_gpus().gpus), None)


def is_older_than(architecture: str) -> bool:
    """Return whether the GPU is of an older architecture than this one, such as ``sm80``; False without a GPU."""
    gpu = first_gpu()
    return gpu is not None and int(gpu.architecture[2:]) < int(architecture[2:])


def graph_precision(artifact: Artifact) -> str:
    """Return the precision that an ``onnx`` artifact was exported in."""
    return str(artifact.card.config.get("precision", "fp32"))


def name_artifact_in_errors(artifact: Artifact, forward: Forward) -> Forward:
    """Return the same function; its errors are :class:`RunFailed` and name the artifact."""

    def named(batch: ModelInput) -> NDArray[np.float32]:
        try:
            with reraise_as_artifact_error(artifact):
                return forward(batch)
        except UserError as error:
            raise RunFailed(str(error)) from None

    return named


def single_line(error: Exception) -> str:
    """Return an error's text with every run of white space as one space."""
    return " ".join(str(error).split())
