from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from export.config import EmbedConfig, Int8Config, ServingConfig
from export.embed import embed_catalog
from export.int8 import export_int8
from export.parity import parity
from export.serving import export_serving
from export.to_onnx import load_onnx, run_graph
from export.widen import quantises_fp16, to_fp32
from vpr.artifacts.store import load_artifact
from vpr.data.catalog import Catalog


def test_widened_graph_has_no_halves_and_the_embeddings(fp32: Path, ranges: Path, tmp_path: Path) -> None:
    graph, _ = load_onnx(export_int8(Int8Config(str(fp32), str(ranges), str(tmp_path / "int8"), base="fp16")))
    widened = to_fp32(graph)
    assert quantises_fp16(graph)
    assert not quantises_fp16(widened)
    inferred = onnx.shape_inference.infer_shapes(widened, strict_mode=True).graph
    dtypes = {value.type.tensor_type.elem_type for value in inferred.value_info}
    assert TensorProto.FLOAT16 not in dtypes | {stored.data_type for stored in inferred.initializer}
    pixels = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)
    assert parity(run_graph(graph, pixels), run_graph(widened, pixels))["cosine_min"] > 0.999


def test_graphs_of_floats_are_not_concerned(fp32: Path) -> None:
    graph, _ = load_onnx(fp32)
    assert not quantises_fp16(graph)
    assert to_fp32(graph).graph.initializer == graph.graph.initializer


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_int8_over_fp16_is_fp32_in_a_hand_off_for_cpus(
    fp32: Path, ranges: Path, catalog: Catalog, tmp_path: Path, device: Literal["cpu", "gpu"]
) -> None:
    """ONNX Runtime before 1.30 divides in 16 bits before it rounds to INT8."""
    int8 = export_int8(Int8Config(str(fp32), str(ranges), str(tmp_path / "int8"), base="fp16"))
    assert catalog.artifact is not None
    images = EmbedConfig(str(int8), str(catalog.artifact.path), str(tmp_path / "gallery"), split="test")
    gallery = embed_catalog(images)
    written = export_serving(ServingConfig(str(int8), str(gallery), str(tmp_path / "serving"), device=device))
    served = onnx.load(written / "model_repository" / "int8" / "1" / "model.onnx")
    assert quantises_fp16(served) == (device == "gpu")
    assert ("Runtimes before 1.30" in (written / "README.md").read_text()) == (device == "gpu")
    pixels = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    assert parity(run_graph(load_onnx(int8)[0], pixels), run_graph(served, pixels))["cosine_min"] > 0.999
    assert load_artifact(written).card.config.get("base") == ("fp32" if device == "cpu" else None)
