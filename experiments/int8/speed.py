"""ViT-S/16 at 224 pixels on this machine's CPU: torch, OpenVINO in FP32 and in INT8, side by side."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from calibration.activation_stats import measure_activations as observe
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
_OVER_TORCH, _OVER_FLOAT = 3.5, 2.0


def cpu_speed(command: str) -> tuple[list[Figure], list[Row]]:
    """Milliseconds of random weights: speed does not depend on them."""
    torch.manual_seed(0)
    torch.set_num_threads(default_threads())
    model = Student(StudentConfig(**{**vars(_SMALL), "embedding_dim": 256})).eval()
    graph = trace(model, _SMALL.image_size, 23)
    pixels = np.random.default_rng(0).normal(size=(max(_BATCHES), 3, 224, 224)).astype(np.float32)
    thresholds = {name: seen.histogram.largest for name, seen in observe(graph, [pixels[:4]]).items()}
    eight = quantise(graph, thresholds, quantised_nodes(graph))
    forwards = {
        "torch eager, FP32": torch_forward(model),
        "OpenVINO, FP32": openvino_forward(graph, default_threads()),
        "OpenVINO, INT8": openvino_forward(eight, default_threads()),
    }
    figures, rows = [], []
    for batch in _BATCHES:
        calls = {name: partial(one, pixels[:batch]) for name, one in forwards.items()}
        times = {name: summarise(seen) for name, seen in measure(calls, _SECONDS).items()}
        eager, floats, ours = (times[name]["p50"] for name in forwards)
        what = f"ViT-S/16-224, batch {batch}: OpenVINO INT8"
        figures += [
            Figure(f"{what} over torch eager, times faster", eager / ours, "", _OVER_TORCH, ">=", command),
            Figure(f"{what} over OpenVINO FP32, times faster", floats / ours, "", _OVER_FLOAT, ">=", command),
        ]
        rows += [
            {"batch": batch, "by": name, "ms, p50": f"{one['p50']:.1f}", "p99": f"{one['p99']:.1f}"}
            for name, one in times.items()
        ]
    return figures, rows
