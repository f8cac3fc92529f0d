"""ONNX graphs run by OpenVINO on the CPU; it computes Q/DQ in INT8 over FP32 and FP16 graphs. Needs no torch."""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.backends.base import (
    INSTALL,
    BackendUnavailable,
    graph_precision,
    import_or_explain,
    name_artifact_in_errors,
)
from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.common.hardware import lacks_vnni
from vpr.common.log import get_logger
from vpr.common.telemetry import disable_telemetry
from vpr.imaging.preprocess import ModelInput
from vpr.inference.onnx_session import INPUT, OUTPUT
from vpr.retrieval.embeddings import Forward

if TYPE_CHECKING:  # listing the backends needs no onnx
    import onnx

log = get_logger(__name__)


@dataclass(frozen=True)
class OpenVinoBackend:
    """Graphs by OpenVINO on the CPU."""

    name: str = "openvino"
    kinds: tuple[str, ...] = ("onnx",)

    def missing(self) -> str | None:
        """See :class:`export.backends.base.Backend`."""
        return import_or_explain("openvino", INSTALL)[1]

    def version(self) -> str:
        """See :class:`export.backends.base.Backend`."""
        openvino = importlib.import_module("openvino")
        saturates = "; INT8 saturates: this CPU reports no VNNI" if lacks_vnni() else ""
        return f"{openvino.__version__.split('-')[0]}; {', '.join(openvino.Core().available_devices)}{saturates}"

    def precision(self, artifact: Artifact) -> str:
        """See :class:`export.backends.base.Backend`."""
        return graph_precision(artifact)

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """See :class:`export.backends.base.Backend`."""
        from vpr.inference.onnx_file import MODEL_FILE, is_large
        from vpr.inference.onnx_graph import load_graph

        with reraise_as_artifact_error(artifact):
            graph = load_graph(artifact)
            source = artifact.file(MODEL_FILE) if is_large(graph) else graph
        try:
            with reraise_as_artifact_error(artifact):
                forward = openvino_forward(source, threads)
        except UserError as error:  # the graph is valid, so another backend may run it
            raise BackendUnavailable(str(error)) from None
        return name_artifact_in_errors(artifact, forward)


def openvino_forward(graph: onnx.ModelProto | Path, threads: int = 0) -> Forward:
    """Return a graph, or an ONNX file, as a function of arrays that any number of threads may call.

    OpenVINO's INT8 kernels saturate on processors without VNNI, and no setting avoids it. The first such graph
    logs a warning. With 0 ``threads`` OpenVINO chooses their number. :class:`UserError` if it cannot compile the graph.
    """
    disable_telemetry()
    import openvino

    from vpr.inference.onnx_file import MODEL_FILE, is_large, save_graph
    from vpr.inference.onnx_graph import reraise_as_graph_error

    # Without the precision hint the CPU plugin computes FP32 graphs in BF16 where the processor has it.
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    with reraise_as_graph_error("openvino"):
        if lacks_vnni() and _has_int8(graph):
            _warn_saturation()
        core = openvino.Core()
        if isinstance(graph, Path):
            compiled = core.compile_model(str(graph), "CPU", options)
        elif not is_large(graph):
            compiled = core.compile_model(core.read_model(graph.SerializeToString(), b""), "CPU", options)
        else:
            with TemporaryDirectory() as folder:
                save_graph(graph, Path(folder))
                compiled = core.compile_model(str(Path(folder) / MODEL_FILE), "CPU", options)
    local = threading.local()  # threads that share a request get each other's results

    def forward(batch: ModelInput) -> NDArray[np.float32]:
        with reraise_as_graph_error("openvino"):
            if not hasattr(local, "request"):
                local.request = compiled.create_infer_request()
            return local.request.infer({INPUT: batch})[OUTPUT].copy()

    return forward


def _has_int8(graph: onnx.ModelProto | Path) -> bool:
    import onnx

    model = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph
    return any(tensor.data_type == onnx.TensorProto.INT8 for tensor in model.graph.initializer)


@cache
def _warn_saturation() -> None:
    log.warning("openvino: INT8 saturates, because this CPU reports no VNNI. Use onnxruntime-cpu for exact embeddings.")
