"""ONNX graphs run by ONNX Runtime, on the CPU or by one of its GPU execution providers."""

import importlib
from dataclasses import dataclass

from export.backends import base
from vpr.artifacts.store import Artifact
from vpr.common.errors import UserError
from vpr.inference.onnx_session import (
    CPU,
    RTX_WHEEL,
    TENSORRT,
    TENSORRT_RTX,
    ProviderMissing,
    missing_tensorrt_library,
    rtx_devices,
    runs_tensorrt_rtx,
)
from vpr.retrieval.embeddings import Forward


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """Graphs by one execution provider of ONNX Runtime."""

    name: str  # name in ``report.json``
    provider: str  # ONNX Runtime's name of the execution provider
    kinds: tuple[str, ...] = ("onnx",)

    def missing(self) -> str | None:
        """See :class:`export.backends.base.Backend`."""
        runtime, reason = base.import_or_explain("onnxruntime", base.INSTALL)
        if runtime is None or self.provider == CPU:
            return reason
        if self.provider == TENSORRT_RTX:
            wheel, reason = base.import_or_explain(RTX_WHEEL, base.INSTALL)
            if wheel is None:
                return reason
        elif self.provider not in runtime.get_available_providers():
            return f"this build of ONNX Runtime has no {self.provider}. {base.INSTALL}"
        if reason := base.explain_no_gpu():
            return reason
        if self.provider == TENSORRT and (library := missing_tensorrt_library()):
            built = f"ONNX Runtime {runtime.__version__} is built for it"
            return f"{library} cannot be loaded; {built}. Install that version of TensorRT, or use tensorrt instead."
        return _explain_no_rtx_gpu() if self.provider == TENSORRT_RTX else None

    def version(self) -> str:
        """See :class:`export.backends.base.Backend`."""
        return str(importlib.import_module("onnxruntime").__version__)

    def precision(self, artifact: Artifact) -> str:
        """See :class:`export.backends.base.Backend`."""
        return base.graph_precision(artifact)

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """See :class:`export.backends.base.Backend`. A graph that the provider rejects is no fault of the graph."""
        from vpr.inference.onnx_graph import GraphSession, load_graph

        graph = load_graph(artifact)
        try:
            session = GraphSession(graph, threads, self.provider)
        except ProviderMissing as error:
            raise base.BackendUnavailable(str(error)) from None
        except UserError as error:
            raise base.BackendUnavailable(f"{artifact.path}: {error}") from None
        return base.name_artifact_in_errors(artifact, session.embed)


def _explain_no_rtx_gpu() -> str | None:
    """Return the reason if TensorRT-RTX's plugin does not load or does not run on the GPU, else None."""
    gpu = base.first_gpu()
    if gpu and not runs_tensorrt_rtx(gpu.compute_capability):
        need = "TensorRT-RTX's plugin needs compute capability 8.6, 8.9, or 12.0 and newer"
        return f"{need}; this GPU is {gpu.name} ({gpu.compute_capability}). Use onnxruntime-cuda or tensorrt."
    try:
        return None if rtx_devices() else "TensorRT-RTX finds no GPU that it supports. See `nvidia-smi`."
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        return f"TensorRT-RTX's plugin cannot be loaded ({base.single_line(error)}). {base.INSTALL}"
