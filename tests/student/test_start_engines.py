"""Engines of students that start from pretrained ViTs, built by TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import pytest

from calibration.activation_stats import measure_activations
from calibration.onnx_layers import weighted_nodes
from export.config import EngineConfig
from export.fp16 import to_fp16
from export.qdq import quantise, quantised_nodes
from export.tensorrt.bindings import import_tensorrt
from export.tensorrt.build import build_plan
from export.to_onnx import trace
from student.weight_selection import init_from_start
from tests.student.test_start import build, pixels_for, start_of, tower_of
from tests.student.towers import OPEN_CLIP, TIMM

_CONFIG = EngineConfig(onnx="", output="", target="sm80,sm120")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TIMM, *OPEN_CLIP])
def test_fp16_and_int8_engines_of_each_family_are_built(name: str) -> None:
    visual = tower_of(name)
    start = start_of(visual)
    student = build(start)
    visual.proj = None  # features are compared
    init_from_start(student, start)
    graph, x = trace(student, student.config.image_size, 20), pixels_for(student, 2)
    measured = measure_activations(graph, [x.numpy()])
    limits = {node.input[0]: float(measured[node.input[0]].channel_max.max()) for node in weighted_nodes(graph)}
    quantised = quantise(graph, limits, quantised_nodes(graph))
    tensorrt = import_tensorrt("tensorrt-rtx")
    for precision, model in (("HALF", to_fp16(graph)), ("INT8", to_fp16(quantised))):
        plan, layers = build_plan(tensorrt, "tensorrt-rtx", model, _CONFIG)
        assert len(plan) > 10_000
        assert layers["precisions"].get(precision, 0) > 0, layers["precisions"]
