"""Every shape of student, in every precision and opset, is taken by the TensorRT-RTX builder for every target."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calibration.statistics import measure
from export.engine import EngineConfig, build_plan, load_builder
from export.onnx_graph import run_graph, trace
from export.parity import parity
from export.precision import to_fp16
from export.qdq import quantise, quantised_nodes
from student.model import Student, StudentConfig
from tests.conftest import small_student

CONFIG = EngineConfig(onnx="", output="", target="sm80,sm86,sm89,sm120")
SHAPES: dict[str, dict[str, Any]] = {
    "patches": {},
    "convolutional stem": {"stem": "conv"},
    "small data": {"family": "small-data"},
    "registers and mean": {"registers": 4, "pool": "mean"},
}


def _student(shape: str) -> Student:
    torch.manual_seed(0)
    config: StudentConfig = replace(small_student("patch"), **SHAPES[shape])
    return Student(config).eval()


@pytest.mark.parametrize(("shape", "opset"), list(product(SHAPES, [20, 23])))
def test_it_builds_and_computes_what_pytorch_does(shape: str, opset: int) -> None:
    model, trt = _student(shape), load_builder("tensorrt-rtx")
    pixels = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()
    graph = trace(model, 32, opset)
    seen = measure(graph, [pixels])
    thresholds = {name: one.histogram.largest for name, one in seen.items()}
    linears, every = quantised_nodes(graph), quantised_nodes(graph, (), "full-mha")
    # Largest drop of the cosine, and the number of tensors that are quantised.
    written: dict[str, tuple[onnx.ModelProto, float, int]] = {
        "fp32": (graph, 1e-6, 0),
        "fp16": (to_fp16(graph), 1e-4, 0),
        "int8": (to_fp16(quantise(graph, thresholds, linears)), 0.01, len(linears)),
        "int8, full-mha": (to_fp16(quantise(graph, thresholds, every)), 0.02, len(seen)),
        "fp8": (to_fp16(quantise(graph, thresholds, linears, "fp8")), 0.02, len(linears)),
    }
    for precision, (made, most, _) in written.items():
        assert 1 - parity(expected, run_graph(made, pixels))["cosine_min"] < most, precision
    # TensorRT-RTX has no fused attention in FP32: what is built for GPUs is the others.
    for precision in list(written)[1:]:
        config = replace(CONFIG, target="sm89,sm120") if precision == "fp8" else CONFIG
        plan, layers = build_plan(trt, "tensorrt-rtx", written[precision][0], config)
        assert len(plan) > 10_000
        assert layers["layers"].get("QUANTIZE", 0) == written[precision][2], precision
