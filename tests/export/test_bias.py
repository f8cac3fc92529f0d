"""INT8 over FP16 on the runtimes that it is offered for, against ONNX's reference evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from calibration.activation_stats import measure_activations
from export import to_onnx
from export.backends.openvino_runtime import openvino_forward
from export.bias import needs_separate_bias, separate_biases
from export.fp16 import to_fp16
from export.parity import parity
from export.qdq import quantise, quantised_nodes
from student.model import Student
from tests.conftest import small_student

_LEVELS = ort.GraphOptimizationLevel


def _pixels(count: int, size: int = 32) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(count, 3, size, size)).astype(np.float32)


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    """FP32 graph of a convolutional stem with statistics as after training: small weights, large biases."""
    torch.manual_seed(0)
    model = Student(small_student("conv")).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(5, 50)
            torch.nn.init.uniform_(module.bias, 0.5, 3)
    return to_onnx.trace(model, 32, 23)


def _quantise(graph: onnx.ModelProto) -> onnx.ModelProto:
    thresholds = {name: tensor.histogram.largest for name, tensor in measure_activations(graph, [_pixels(8)]).items()}
    return quantise(graph, thresholds, quantised_nodes(graph, None, "full"))


def _run(graph: onnx.ModelProto, level: ort.GraphOptimizationLevel, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run a graph by ONNX Runtime as a server does, with no other setting."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": pixels})[0]


@pytest.mark.parametrize("base", ["fp16", "fp32"])
def test_int8_graph_gives_the_values_of_the_reference(graph: onnx.ModelProto, base: str) -> None:
    quantised, pixels = _quantise(graph), _pixels(4)
    quantised = to_fp16(quantised) if base == "fp16" else quantised
    (expected,) = ReferenceEvaluator(quantised).run(None, {"pixels": pixels})
    for level in (_LEVELS.ORT_ENABLE_ALL, _LEVELS.ORT_DISABLE_ALL):
        assert parity(expected, _run(quantised, level, pixels))["cosine_min"] >= 0.9999
    assert parity(expected, openvino_forward(quantised)(pixels))["cosine_min"] >= 0.9999


def test_only_biases_between_quantised_layers_are_moved(graph: onnx.ModelProto) -> None:
    half = to_fp16(_quantise(graph))
    readers = {name: node for node in half.graph.node for name in node.input}
    convolutions = [node for node in half.graph.node if node.op_type == "Conv"]
    # The first convolution is not quantised, and no quantisation follows the last.
    assert [len(node.input) for node in convolutions] == [3, 2, 2, 3]
    added = readers[convolutions[1].output[0]]
    assert [added.op_type, readers[added.output[0]].op_type] == ["Add", "Relu"]
    assert not any(node.name.endswith("_bias") for node in to_fp16(graph).graph.node)
    assert not any(node.name.endswith("_bias") for node in _quantise(graph).graph.node)
    assert needs_separate_bias(graph, quantised_nodes(graph, (), "full"))
    assert not needs_separate_bias(graph, quantised_nodes(graph, (), "linear"))


def test_bias_of_a_gemm_keeps_its_factor() -> None:
    def constant(name: str, values: NDArray[np.generic]) -> TensorProto:
        return numpy_helper.from_array(values, name)

    weight = np.random.default_rng(0).integers(-127, 128, (4, 6)).astype(np.int8)
    half = np.float16
    body = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
            helper.make_node("Gemm", ["xd", "wd", "b"], ["g"], name="layer/Gemm", beta=0.5),
            helper.make_node("Relu", ["g"], ["r"]),
            helper.make_node("QuantizeLinear", ["r", "s", "z"], ["rq"]),
            helper.make_node("DequantizeLinear", ["rq", "s", "z"], ["y"]),
        ],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 6])],
        [
            *(constant("s", np.array(0.05, half)), constant("z", np.array(0, np.int8)), constant("w", weight)),
            constant("b", np.linspace(-2, 2, 6).astype(half)),
        ],
    )
    graph = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(half)
    (expected,) = ReferenceEvaluator(graph).run(None, {"x": x})
    separate_biases(graph)
    onnx.checker.check_model(graph, full_check=True)
    assert [node.op_type for node in graph.graph.node].count("Add") == 1
    (actual,) = ReferenceEvaluator(graph).run(None, {"x": x})
    np.testing.assert_allclose(actual, expected, atol=0.06)  # one step of the output
