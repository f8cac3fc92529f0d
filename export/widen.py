"""FP16 graphs rewritten in FP32, for runtimes that round FP16 values differently from ONNX."""

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.opset import lower_opset
from vpr.artifacts.store import Artifact
from vpr.common.log import get_logger
from vpr.inference.onnx_file import check_well_formed
from vpr.inference.onnx_graph import load_graph, reraise_as_graph_error

log = get_logger(__name__)

EXACT_RUNTIME = "1.30"  # earlier ONNX Runtimes divide in 16 bits before they round to INT8, on the CPU
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "precision", "softmax_precision", "stash_type")


def quantises_fp16(graph: onnx.ModelProto) -> bool:
    """Return whether a graph quantises FP16 values, by the dtype of the scales."""
    halves = {stored.name for stored in graph.graph.initializer if stored.data_type == TensorProto.FLOAT16}
    return any(node.op_type == "QuantizeLinear" and node.input[1] in halves for node in graph.graph.node)


def graph_for_server(model: Artifact, device: str) -> onnx.ModelProto:
    """Return the graph of an ``onnx`` artifact as old runtimes compute it rightly on ``cpu``, or as it is on ``gpu``.

    Its opset is lowered. A graph that quantises FP16 values is widened for CPUs, and warned of for GPUs.
    """
    graph = lower_opset(load_graph(model))
    if not quantises_fp16(graph):
        return graph
    if device == "cpu":
        log.info(f"{model.path}: its FP16 parts become FP32, which CPUs compute in any case")
        return to_fp32(graph)
    fix = f"Serve it with {EXACT_RUNTIME} or newer, or export INT8 with --base fp32"
    log.warning(f"{model.path}: ONNX Runtime before {EXACT_RUNTIME} may round INT8 over FP16 otherwise. {fix}.")
    return graph


@reraise_as_graph_error("FP32")
def to_fp32(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with its FP16 weights, scales and activations in FP32.

    Weights and scales keep their values, so that only the rounding of activations to 16 bits is gone. Inputs and
    outputs are FP32 or uint8 in the graphs of this toolkit, and stay.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    for stored in model.graph.initializer:
        _widen(stored)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
            elif attribute.name in _DTYPE_ATTRIBUTES and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    del model.graph.value_info[:]
    check_well_formed(model)
    return model


def _widen(stored: TensorProto) -> None:
    if stored.data_type == TensorProto.FLOAT16:
        stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored).astype(np.float32), stored.name))
