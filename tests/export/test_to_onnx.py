from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.config import OnnxConfig
from export.fp16 import to_fp16
from export.parity import parity
from export.to_onnx import export_onnx, load_onnx, run_graph, trace
from student.model import load_student
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog


def _inputs(n: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize("opset", [20, 23])
def test_graph_equals_pytorch_at_every_batch(each_student: Path, opset: int) -> None:
    model, _ = load_student(each_student)
    inputs, graph = _inputs(9), trace(model, 32, opset)
    with torch.inference_mode():
        expected = model(torch.from_numpy(inputs)).numpy()
    for batch in (1, 3, 8):
        actual = run_graph(graph, inputs, batch)
        assert np.abs(actual - expected).max() <= 1e-5
        np.testing.assert_allclose(np.linalg.norm(actual, axis=1), 1, atol=1e-5)


def test_nodes_have_module_names(graph: onnx.ModelProto) -> None:
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("Attention") == 2
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert "vit.transformer.layers.1.0.to_qkv/MatMul" in names
    assert not any(node.metadata_props for node in graph.graph.node)


def test_card_lists_inputs_and_outputs(fp32: Path, each_student: Path) -> None:
    card = load_artifact(fp32).card
    student = load_artifact(each_student)
    assert [(spec.name, spec.dtype, spec.shape) for spec in card.inputs] == [
        ("pixels", "float32", ["batch", 3, 32, 32])
    ]
    assert [(spec.name, spec.dtype, spec.shape) for spec in card.outputs] == [("embedding", "float32", ["batch", 32])]
    assert (card.preprocess, card.embedding) == (student.card.preprocess, student.card.embedding)
    assert [parent.sha256 for parent in card.parents] == [student.sha256]


def test_fp16_graph_is_half_as_large_and_close(graph: onnx.ModelProto) -> None:
    half = to_fp16(graph)
    dtypes = {tensor.data_type for tensor in half.graph.initializer if len(tensor.dims) == 2}
    assert dtypes == {onnx.TensorProto.FLOAT16}
    assert half.ByteSize() < 0.65 * graph.ByteSize()
    inputs = _inputs(16)
    metrics = parity(run_graph(graph, inputs), run_graph(half, inputs))
    assert metrics["cosine_min"] > 0.99999
    types = [value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)]
    assert types == [onnx.TensorProto.FLOAT] * 2


def test_fp32_normalisation_prevents_overflow(graph: onnx.ModelProto) -> None:
    scaled = onnx.ModelProto()
    scaled.CopyFrom(graph)
    head = next(node for node in scaled.graph.node if node.name.startswith("vit.mlp_head"))
    weight = next(tensor for tensor in scaled.graph.initializer if tensor.name == head.input[1])
    values = onnx.numpy_helper.to_array(weight) * 2000
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    inputs = _inputs(4)
    actual = run_graph(to_fp16(scaled), inputs)
    # The squares of these outputs exceed 65,504.
    assert parity(run_graph(scaled, inputs), actual)["cosine_min"] > 0.9999


def test_weight_beyond_fp16_is_named(graph: onnx.ModelProto) -> None:
    large = onnx.ModelProto()
    large.CopyFrom(graph)
    tensor = next(t for t in large.graph.initializer if len(t.dims) == 2)
    values = onnx.numpy_helper.to_array(tensor) * 1e9
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(UserError, match="exceeds FP16's range"):
        to_fp16(large)


def test_catalogue_images_are_compared(each_student: Path, catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    config = OnnxConfig(str(each_student), str(tmp_path / "o"), catalog=str(catalog.artifact.path), images=20)
    metrics = load_artifact(export_onnx(config)).card.metrics
    assert metrics["images"] == 20
    assert metrics["max_abs"] <= 1e-4


def test_unchanged_export_is_skipped(each_student: Path, fp32: Path) -> None:
    before = (fp32 / "card.json").stat().st_mtime_ns
    export_onnx(OnnxConfig(model=str(each_student), output=str(fp32)))
    assert (fp32 / "card.json").stat().st_mtime_ns == before


def test_artifact_has_one_file_of_the_model(fp32: Path) -> None:
    files = load_onnx(fp32)[1].card.files
    assert {name for name in files if not name.startswith("golden/")} == {"model.onnx", "seen.parquet"}
