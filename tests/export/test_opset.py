"""Graphs for older runtimes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from export import to_onnx
from export.fp16 import to_fp16
from export.opset import lower_opset, opset_of
from export.to_onnx import run_graph
from student.config import StudentConfig
from student.model import Student
from tests.conftest import small_student
from vpr.common.errors import UserError

SHAPES = {
    "patch": small_student("patch"),
    "map": replace(small_student("patch"), pool="map"),
    "mask": replace(small_student("patch"), family="small-data"),
}


def _graph(config: StudentConfig) -> onnx.ModelProto:
    torch.manual_seed(0)
    return to_onnx.trace(Student(config).eval(), config.image_size, 23)


@pytest.mark.parametrize("shape", SHAPES)
def test_lowered_graph_has_the_same_values(shape: str) -> None:
    """Attention with and without a mask, of few queries too; ONNX Runtime 1.20 loads opset 21 and IR version 10."""
    graph = _graph(SHAPES[shape])
    lowered = lower_opset(graph)
    assert opset_of(graph) == 23
    assert opset_of(lowered) == 20
    assert lowered.ir_version <= 10
    assert "Attention" not in {node.op_type for node in lowered.graph.node}
    x = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(run_graph(lowered, x), run_graph(graph, x), atol=2e-6)
    # The graph itself is not changed.
    assert "Attention" in {node.op_type for node in graph.graph.node}


def test_lowered_fp16_graph_has_the_same_values() -> None:
    graph = to_fp16(_graph(SHAPES["patch"]), [])
    x = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(run_graph(lower_opset(graph), x), run_graph(graph, x), atol=3e-3)


def test_graph_of_opset_20_stays() -> None:
    torch.manual_seed(0)
    config = SHAPES["patch"]
    graph = to_onnx.trace(Student(config).eval(), config.image_size, 20)
    assert lower_opset(graph).graph == graph.graph


def test_causal_attention_is_rejected() -> None:
    graph = _graph(SHAPES["patch"])
    node = next(node for node in graph.graph.node if node.op_type == "Attention")
    next(attribute for attribute in node.attribute if attribute.name == "is_causal").i = 1
    with pytest.raises(UserError, match=r"model: .*/Attention is an Attention .* Export the graph with --opset 20"):
        lower_opset(graph)
