"""Latency of ViT-S/16 at 224 pixels on this CPU: PyTorch, OpenVINO FP32 and OpenVINO INT8."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from calibration.activation_stats import measure_activations
from experiments.figures import Figure, Row
from export.backends.openvino_runtime import openvino_forward
from export.backends.registry import default_threads
from export.qdq import quantise, quantised_nodes
from export.to_onnx import trace
from student.config import StudentConfig
from student.model import Student
from vpr.inference.timing import measure, summarise
from vpr.retrieval.embeddings import torch_forward

_SMALL = StudentConfig(image_size=224, patch_size=16, dim=384, depth=12, heads=6, dim_head=64, mlp_dim=1536)
_BATCHES = (1, 8)
_SECONDS = 10.0
_TORCH_GOAL, _FP32_GOAL = 3.5, 2.0


def cpu_speed(command: str) -> tuple[list[Figure], list[Row]]:
    """Measure milliseconds with random weights, which do not change the speed."""
    torch.manual_seed(0)
    torch.set_num_threads(default_threads())
    model = Student(StudentConfig(**{**vars(_SMALL), "embedding_dim": 256})).eval()
    graph = trace(model, _SMALL.image_size, 23)
    pixels = np.random.default_rng(0).normal(size=(max(_BATCHES), 3, 224, 224)).astype(np.float32)
    thresholds = {name: stats.histogram.largest for name, stats in measure_activations(graph, [pixels[:4]]).items()}
    int8 = quantise(graph, thresholds, quantised_nodes(graph))
    forwards = {
        "torch eager, FP32": torch_forward(model),
        "OpenVINO, FP32": openvino_forward(graph, default_threads()),
        "OpenVINO, INT8": openvino_forward(int8, default_threads()),
    }
    figures, rows = [], []
    for batch in _BATCHES:
        calls = {name: partial(forward, pixels[:batch]) for name, forward in forwards.items()}
        times = {name: summarise(measurement) for name, measurement in measure(calls, _SECONDS).items()}
        eager_ms, fp32_ms, int8_ms = (times[name]["p50"] for name in forwards)
        title = f"ViT-S/16-224, batch {batch}: OpenVINO INT8"
        figures += [
            Figure(f"{title} over torch eager, times faster", eager_ms / int8_ms, "", _TORCH_GOAL, ">=", command),
            Figure(f"{title} over OpenVINO FP32, times faster", fp32_ms / int8_ms, "", _FP32_GOAL, ">=", command),
        ]
        rows += [
            {"batch": batch, "by": name, "ms, p50": f"{latency['p50']:.1f}", "p99": f"{latency['p99']:.1f}"}
            for name, latency in times.items()
        ]
    return figures, rows
