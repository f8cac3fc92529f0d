"""The protocol of a backend, and the checks and error handling that all backends share."""

import importlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.hardware import read_gpus
from vpr.common.telemetry import disable_telemetry
from vpr.imaging.preprocess import ModelInput
from vpr.retrieval.embeddings import Forward

INSTALL = "Run `pip install -r requirements.txt`."
INSTALL_GPU = "Run `pip install -r requirements-gpu.txt`."


class BackendUnavailable(Exception):
    """This backend cannot run here. The message says why and how to fix it."""


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
    return None if read_gpus()[0] else "needs an NVIDIA GPU; this machine has none"


def graph_precision(artifact: Artifact) -> str:
    """Return the precision that an ``onnx`` artifact was exported in."""
    return str(artifact.card.config.get("precision", "fp32"))


def name_artifact_in_errors(artifact: Artifact, forward: Forward) -> Forward:
    """Return the same function; its errors name the artifact."""

    def named(batch: ModelInput) -> NDArray[np.float32]:
        with reraise_as_artifact_error(artifact):
            return forward(batch)

    return named


def single_line(error: Exception) -> str:
    """Return an error's text with every run of white space as one space."""
    return " ".join(str(error).split())
