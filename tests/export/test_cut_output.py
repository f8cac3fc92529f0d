from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.config import Int8Config, OnnxConfig, ParityConfig
from export.cut_output import cut_output
from export.int8 import export_int8
from export.parity_report import compare_exports
from export.to_onnx import export_onnx, load_onnx, run_graph
from student.model import load_student
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog


def inputs(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 3, 32, 32)).astype(np.float32)


def expected_prefix(student: Path, images: np.ndarray, dimensions: int) -> np.ndarray:
    model, _ = load_student(student)
    with torch.inference_mode():
        full = model(torch.from_numpy(images)).double().numpy()[:, :dimensions]
    return full / np.sqrt(np.square(full).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("dimensions", [1, 8, 32])
def test_cut_graph_equals_the_cut_embedding(each_student: Path, graph: onnx.ModelProto, dimensions: int) -> None:
    before = graph.SerializeToString()
    cut = cut_output(graph, dimensions)
    images = inputs(5)
    np.testing.assert_allclose(run_graph(cut, images), expected_prefix(each_student, images, dimensions), atol=1e-5)
    assert graph.SerializeToString() == before


@pytest.mark.parametrize("values", [{}, {"precision": "fp16"}, {"input": "uint8"}, {"opset": 20}])
def test_exported_graph_is_cut(values: dict, each_student: Path, tmp_path: Path) -> None:
    config = OnnxConfig(str(each_student), str(tmp_path / "cut"), dimensions=8, images=8, **values)
    graph, artifact = load_onnx(export_onnx(config))
    assert artifact.card.embedding is not None
    assert (artifact.card.embedding.dim, artifact.card.outputs[0].shape) == (8, ["batch", 8])
    assert artifact.card.metrics["cosine_min"] > 0.999
    assert run_graph(graph, np.zeros((2, 3, 32, 32), np.uint8 if "input" in values else np.float32)).shape == (2, 8)


def test_cut_graph_is_quantised_and_compared(
    each_student: Path, ranges: Path, fp32: Path, catalog: Catalog, tmp_path: Path
) -> None:
    assert catalog.artifact is not None
    path = str(catalog.artifact.path)
    cut = export_onnx(OnnxConfig(str(each_student), str(tmp_path / "cut"), dimensions=8))
    report = compare_exports(ParityConfig(str(each_student), (str(cut), str(fp32)), path, str(tmp_path / "parity")))
    assert load_artifact(report).card.kind == "report"
    with pytest.raises(UserError, match="ranges"):  # those of the full graph
        export_int8(Int8Config(str(cut), str(ranges), str(tmp_path / "int8")))


def test_more_dimensions_than_the_model_has_are_rejected(each_student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dimensions: expected at most the 32 of .*, got 64\. Lower it"):
        export_onnx(OnnxConfig(str(each_student), str(tmp_path / "cut"), dimensions=64))
    assert not any(tmp_path.iterdir())
