"""The TensorRT-RTX builder accepts every kind of graph that the toolkit writes, for every target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from calibration.activation_stats import measure_activations
from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from calibration.onnx_layers import attention_nodes
from export import to_onnx
from export.config import EngineConfig, Int8Config, QuantDtype, Recipe
from export.fp16 import to_fp16
from export.int8 import export_int8
from export.parity import parity
from export.qdq import quantise, quantised_nodes
from export.tensorrt.bindings import import_tensorrt
from export.tensorrt.build import build_plan
from export.to_onnx import load_onnx, run_graph
from student.config import PRESETS, Preset, StudentConfig
from student.model import Student
from tests.conftest import small_student
from vpr.data.catalog import Catalog

CONFIG = EngineConfig(onnx="", output="", target="sm80,sm86,sm89,sm120")
# FP8 is for Ada and later.
FP8_CONFIG = replace(CONFIG, target="sm89,sm120")
SHAPES: dict[str, dict[str, Any]] = {
    "patches": {},
    "convolutional stem": {"stem": "conv"},
    "network as stem": {"stem": "timm/test_efficientnet", "patch_size": 32, "image_size": 64},
    "small data": {"family": "small-data"},
    "registers and mean": {"registers": 4, "pool": "mean"},
}
# Largest drop of the smallest cosine, by recipe and dtype.
QUANTISED = {
    ("linear", "int8"): 0.01,
    ("full-mha", "int8"): 0.02,
    ("full", "int8"): 0.02,
    ("linear", "fp8"): 0.02,
    ("full-mha", "fp8"): 0.04,
    ("full", "fp8"): 0.04,
}


def _pixels(size: int = 32) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(5, 3, size, size)).astype(np.float32)


def _thresholds(graph: onnx.ModelProto, size: int = 32) -> dict[str, float]:
    return {name: tensor.histogram.largest for name, tensor in measure_activations(graph, [_pixels(size)]).items()}


@dataclass(frozen=True)
class Traced:
    graph: onnx.ModelProto
    pixels: NDArray[np.float32]
    expected: NDArray[np.float32]
    thresholds: dict[str, float]


@cache
def _traced(shape: str, opset: int) -> Traced:
    torch.manual_seed(0)
    config: StudentConfig = replace(small_student("patch"), **SHAPES[shape])
    model, pixels = Student(config).eval(), _pixels(config.image_size)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()
    graph = to_onnx.trace(model, config.image_size, opset)
    return Traced(graph, pixels, expected, _thresholds(graph, config.image_size))


def _build(graph: onnx.ModelProto, config: EngineConfig = CONFIG) -> dict[str, int]:
    """Build a graph and return its layer counts by type."""
    plan, counted = build_plan(import_tensorrt("tensorrt-rtx"), "tensorrt-rtx", graph, config)
    assert len(plan) > 10_000
    return counted["layers"]


def _graphs() -> list[Any]:
    """Return every shape at both opsets; `make test` takes the default, 23."""
    return [
        pytest.param(shape, opset, marks=pytest.mark.slow if opset == 20 else ())
        for shape, opset in product(SHAPES, [20, 23])
    ]


@pytest.mark.parametrize(("shape", "opset"), _graphs())
def test_float_graphs_build_and_equal_pytorch(shape: str, opset: int) -> None:
    traced = _traced(shape, opset)
    graph = traced.graph
    # In the third graph an attention stays FP32, as if FP16 could not represent its values.
    attention = next(iter(attention_nodes(graph)))
    for exported, max_distance in ((graph, 1e-6), (to_fp16(graph), 1e-4), (to_fp16(graph, [attention]), 1e-4)):
        assert 1 - parity(traced.expected, run_graph(exported, traced.pixels))["cosine_min"] < max_distance
        assert "QUANTIZE" not in _build(exported)


def _quantised_graphs() -> list[Any]:
    """Return every shape, opset, recipe and dtype; `make test` takes all of one shape, and one of each other."""
    graphs = []
    for shape, opset, kind in product(SHAPES, [20, 23], QUANTISED):
        is_fast = opset == 23 and (shape == "patches" or kind == ("full", "int8"))
        graphs.append(pytest.param(shape, opset, *kind, marks=() if is_fast else pytest.mark.slow))
    return graphs


@pytest.mark.parametrize(("shape", "opset", "recipe", "dtype"), _quantised_graphs())
def test_quantised_graphs_build_over_either_base(shape: str, opset: int, recipe: Recipe, dtype: QuantDtype) -> None:
    traced = _traced(shape, opset)
    layers = quantised_nodes(traced.graph, (), recipe)
    quantised = quantise(traced.graph, traced.thresholds, layers, dtype)
    tensors = len({name for names in layers.values() for name in names})
    for exported in (quantised, to_fp16(quantised)):
        assert 1 - parity(traced.expected, run_graph(exported, traced.pixels))["cosine_min"] < QUANTISED[recipe, dtype]
        assert _build(exported, CONFIG if dtype == "int8" else FP8_CONFIG)["QUANTIZE"] == tensors


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_partly_quantised_graphs_build(dtype: QuantDtype) -> None:
    """One linear alone, one attention alone, all but the first block."""
    traced = _traced("patches", 23)
    every = quantised_nodes(traced.graph, (), "full-mha")
    alone = [[next(name for name in every if name.endswith(kind))] for kind in ("MatMul", "Attention")]
    later = [name for name in every if not name.startswith("vit.transformer.layers.0")]
    for subset in (*alone, later):
        exported = to_fp16(quantise(traced.graph, traced.thresholds, subset, dtype))
        layers = _build(exported, CONFIG if dtype == "int8" else FP8_CONFIG)
        assert layers["QUANTIZE"] == len({name for layer in subset for name in every[layer]})


@pytest.mark.parametrize("dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_smoothed_and_corrected_graphs_build(fp32: Path, catalog: Catalog, dtype: QuantDtype, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    config = CalibrateConfig(str(fp32), str(catalog.artifact.path), str(tmp_path / "ranges"), count=16)
    ranges = calibrate(replace(config, smooth=True, correct=True))
    written = load_file(ranges / "adjustments.safetensors")
    assert {name.partition(":")[0] for name in written} == {"smooth", "bias"}
    exported = export_int8(Int8Config(str(fp32), str(ranges), str(tmp_path / "graph"), dtype=dtype))
    layers = _build(load_onnx(exported)[0], CONFIG if dtype == "int8" else FP8_CONFIG)
    assert layers["QUANTIZE"] == len(quantised_nodes(load_onnx(fp32)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "small-data"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds(preset: Preset, family: Literal["vit", "small-data"]) -> None:
    """Published depths and widths, in FP16, INT8 over FP16 and FP8 over FP16."""
    torch.manual_seed(0)
    model = Student(StudentConfig(preset=preset, family=family, embedding_dim=256)).eval()
    size = model.config.image_size
    graph = to_onnx.trace(model, size, 23)
    thresholds, linears = _thresholds(graph, size), quantised_nodes(graph)
    assert _build(to_fp16(graph))["ATTENTION_INPUT"] == model.config.depth
    for dtype, config in (("int8", CONFIG), ("fp8", FP8_CONFIG)):
        exported = to_fp16(quantise(graph, thresholds, linears, dtype))
        assert _build(exported, config)["QUANTIZE"] == len({names[0] for names in linears.values()})
