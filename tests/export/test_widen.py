from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from export.config import Int8Config
from export.int8 import export_int8
from export.parity import parity
from export.to_onnx import load_onnx, run_graph
from export.widen import quantises_fp16, to_fp32


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
