"""Graphs of the Triton hand-off in the oldest ONNX Runtime that it names, installed by ``make oldest-runtime``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calibration.activation_stats import measure_activations
from experiments.figures import ROOT
from experiments.venv_runner import run_in_venv
from export import to_onnx
from export.fp16 import to_fp16
from export.opset import OLDEST_RUNTIME, lower_opset
from export.parity import parity
from export.qdq import quantise, quantised_nodes
from export.to_onnx import run_graph
from export.widen import to_fp32
from student.model import Student
from tests.conftest import small_student

ENVIRONMENT = ".venv-oldest-runtime"
SHAPES: dict[str, dict[str, Any]] = {
    "patches": {},
    "convolutional stem": {"stem": "conv"},
    "network as stem": {"stem": "timm/test_efficientnet", "patch_size": 32, "image_size": 64},
    "small data": {"family": "small-data"},
    "registers and map": {"registers": 4, "pool": "map"},
}
# Largest distance of a cosine from 1 against this environment's runtime. INT8 over FP16 is widened, as in a hand-off
# for CPUs: the older runtime divides in 16 bits before it rounds to INT8.
_DISTANCES = {"fp32": 1e-6, "fp16": 1e-5, "int8 over fp32": 1e-4, "int8 over fp16": 1e-4}


@pytest.mark.skipif(not (ROOT / ENVIRONMENT).is_dir(), reason="`make oldest-runtime` installs the environment")
@pytest.mark.parametrize("shape", SHAPES)
def test_every_graph_equals_this_runtime(shape: str, tmp_path: Path) -> None:
    """FP32, FP16, and INT8 over both: each loads with its default settings and gives the same embeddings."""
    torch.manual_seed(0)
    config = replace(small_student("patch"), **SHAPES[shape])
    graph = to_onnx.trace(Student(config).eval(), config.image_size, 23)
    pixels = np.random.default_rng(0).normal(size=(5, 3, config.image_size, config.image_size)).astype(np.float32)
    graphs = _all_graphs(graph, pixels)
    np.save(tmp_path / "pixels.npy", pixels)
    for name, exported in graphs.items():
        onnx.save(lower_opset(exported), tmp_path / f"{name}.onnx")
    version = run_in_venv(
        ENVIRONMENT, "run_graphs.py", [str(tmp_path), *(f"{name}.onnx" for name in graphs)], "oldest-runtime"
    )
    assert version.strip().rpartition(".")[0] == OLDEST_RUNTIME
    for name, exported in graphs.items():
        distance = 1 - parity(run_graph(exported, pixels), np.load(tmp_path / f"{name}.npy"))["cosine_min"]
        kind = f"int8 over {name[-4:]}" if name.startswith("int8") else name
        assert distance < _DISTANCES[kind], name


def _all_graphs(graph: onnx.ModelProto, pixels: np.ndarray) -> dict[str, onnx.ModelProto]:
    thresholds = {name: tensor.histogram.largest for name, tensor in measure_activations(graph, [pixels]).items()}
    graphs = {"fp32": graph, "fp16": to_fp16(graph)}
    for recipe in ("linear", "full-mha", "full"):
        layers = quantised_nodes(graph, (), recipe)  # type: ignore[arg-type]
        quantised = quantise(graph, thresholds, layers, "int8")
        graphs |= {f"int8-{recipe}-fp32": quantised, f"int8-{recipe}-fp16": to_fp32(to_fp16(quantised))}
    return graphs
