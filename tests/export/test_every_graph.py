"""Every shape of student, in every precision and opset, is taken by the TensorRT-RTX builder for every target."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calibration.calibrate import linear_nodes
from export.engine import EngineConfig, build_plan, load_builder
from export.onnx_graph import run_graph, trace
from export.parity import parity
from export.precision import to_fp16
from export.qdq import quantise
from student.model import Student, StudentConfig
from tests.conftest import small_student
from vpr.int8 import KEEP

CONFIG = EngineConfig(onnx="", output="", targets=("sm80", "sm86", "sm89", "sm120"))
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
    thresholds = {node.input[0]: 4.0 for node in linear_nodes(graph)}
    written: dict[str, onnx.ModelProto] = {
        "fp32": graph,
        "fp16": to_fp16(graph),
        "int8": to_fp16(quantise(graph, thresholds, KEEP)),
    }
    for precision, least in (("fp32", 1 - 1e-6), ("fp16", 0.9999), ("int8", 0.98)):
        assert parity(expected, run_graph(written[precision], pixels))["cosine_min"] > least, precision
    # TensorRT-RTX has no fused attention in FP32: what is built for GPUs is the other two.
    for precision in ("fp16", "int8"):
        plan, layers = build_plan(trt, "tensorrt-rtx", written[precision], CONFIG)
        assert len(plan) > 10_000
        assert bool(layers["layers"].get("QUANTIZE")) == (precision == "int8")
