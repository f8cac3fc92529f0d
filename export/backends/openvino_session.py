"""Graphs on the CPU by OpenVINO, the engine that computes Q/DQ in INT8 over any base precision."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from vpr.common.hardware import lacks_vnni
from vpr.common.log import get_logger
from vpr.common.telemetry import disable_telemetry
from vpr.inference.onnx_graph import reraise_as_graph_error
from vpr.inference.onnx_session import INPUT, OUTPUT
from vpr.retrieval.embeddings import Forward

log = get_logger(__name__)


def openvino_forward(graph: onnx.ModelProto | Path, threads: int = 0) -> Forward:
    """A graph, or the file it lies in, as a function of arrays that any number of threads may call.

    On processors without VNNI OpenVINO's INT8 kernels overflow, and no setting gives others: that is said, once.

    Args:
        graph: with the input and output of our exports.
        threads: 0 leaves their number to OpenVINO.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    disable_telemetry()
    import openvino

    # Without the precision hint the CPU plugin computes FP32 graphs in BF16 where the processor has it.
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    with reraise_as_graph_error("openvino"):
        if lacks_vnni() and _has_eight_bits(graph):
            _say_that_they_overflow()
        core = openvino.Core()
        if isinstance(graph, Path):
            compiled = core.compile_model(str(graph), "CPU", options)
        else:
            compiled = core.compile_model(core.read_model(graph.SerializeToString(), b""), "CPU", options)
    own = threading.local()  # one request for all threads would hand one's result to another

    def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with reraise_as_graph_error("openvino"):
            if not hasattr(own, "request"):
                own.request = compiled.create_infer_request()
            return own.request.infer({INPUT: batch})[OUTPUT].copy()

    return forward


def _has_eight_bits(graph: onnx.ModelProto | Path) -> bool:
    model = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph
    return any(tensor.data_type == onnx.TensorProto.INT8 for tensor in model.graph.initializer)


@cache
def _say_that_they_overflow() -> None:
    log.info(
        "  openvino: no VNNI is seen here, without which its INT8 overflows: see the embeddings by onnxruntime-cpu"
    )
