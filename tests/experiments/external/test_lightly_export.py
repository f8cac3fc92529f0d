"""Student as a timm ViT, and the cut of a classifier's graph, without other environments."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper

from experiments.external.lightly_export import INPUT, OUTPUT, cut_at_scores, timm_arguments, timm_weights
from student.config import StudentConfig
from student.model import Student
from vpr.inference.onnx_graph import GraphSession


@pytest.mark.parametrize(("size", "patch", "dim", "heads"), [(64, 16, 128, 2), (32, 8, 192, 3)])
def test_timm_equals_student(size: int, patch: int, dim: int, heads: int) -> None:
    torch.manual_seed(0)
    config = StudentConfig(
        image_size=size, patch_size=patch, dim=dim, depth=2, heads=heads, mlp_dim=96, embedding_dim=24, stem="conv"
    )
    student = Student(config)
    with torch.no_grad():  # identity norms would hide an error
        for value in (*student.parameters(), *student.buffers()):
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) * 0.2 + 0.01)
    student.eval()
    body, projection = timm_weights(student.state_dict())
    timm_model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **timm_arguments(asdict(config))).eval()
    timm_model.load_state_dict(body)
    pixels = torch.randn(3, 3, size, size)
    with torch.inference_mode():
        pooled = timm_model.forward_features(pixels).mean(dim=1)
        scores = torch.nn.functional.linear(pooled, projection["weight"], projection["bias"])
        expected = student(pixels)
    assert (expected[0] - expected[1]).abs().max() > 1e-5
    torch.testing.assert_close(torch.nn.functional.normalize(scores, dim=1), expected, atol=1e-6, rtol=1e-4)


def _classifier(kind: int) -> onnx.ModelProto:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = np.arange(24, dtype=dtype).reshape(4, 6) / 10
    nodes = [
        helper.make_node("Softmax", ["images"], ["attended"]),
        helper.make_node("MatMul", ["attended", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
        helper.make_node("TopK", ["probabilities", "one"], ["scores", "labels"]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", kind, ["N", 4])],
        [helper.make_tensor_value_info("labels", TensorProto.INT64, ["N", 1])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array([1]), "one")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(("kind", "tolerance"), [(TensorProto.FLOAT, 1e-6), (TensorProto.FLOAT16, 5e-3)])
def test_classifier_is_cut_at_scores(kind: int, tolerance: float) -> None:
    cut = cut_at_scores(_classifier(kind), width=6)
    onnx.checker.check_model(cut, full_check=True)
    assert "TopK" not in {node.op_type for node in cut.graph.node}
    inputs = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    scores = GraphSession(cut, 1).run([OUTPUT], {INPUT: inputs})[0]
    attended = np.exp(inputs) / np.exp(inputs).sum(axis=1, keepdims=True)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, attended @ (np.arange(24).reshape(4, 6) / 10), atol=tolerance)
