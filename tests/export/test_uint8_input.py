"""Graphs that take uint8 pixels: equal to the graph of normalised floats, and used like it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInput

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from export.backends.openvino_runtime import openvino_forward
from export.backends.registry import models_of
from export.config import EngineConfig, Int8Config, OnnxConfig, ParityConfig, ServingConfig
from export.int8 import export_int8
from export.parity import parity
from export.parity_report import compare_exports
from export.serving import export_serving
from export.tensorrt.build import build_engine
from export.to_onnx import export_onnx, load_onnx, run_graph
from student.embed import EmbedConfig, embed_catalog
from tests.conftest import edit_card
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog

LAYOUTS = ("NCHW", "NHWC")


def _images(count: int, size: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def _normalise(path: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Normalise by the card's mean and standard deviation, in float64."""
    preprocess = load_artifact(path).card.preprocess
    assert preprocess is not None
    mean, std = (np.array(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return ((images / 255 - mean) / std).astype(np.float32)


def _lay_out(images: NDArray[np.uint8], layout: str) -> NDArray[np.uint8]:
    return images if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(images, 1, 3))


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def uint8(student_artifact: Path, layout: str) -> Path:
    output = student_artifact.parent / f"uint8-{layout}"
    config = OnnxConfig(str(student_artifact), str(output), images=5, input="uint8", layout=layout)  # type: ignore[arg-type]
    return export_onnx(config)


@pytest.fixture(scope="module")
def floats(student_artifact: Path) -> Path:
    return export_onnx(OnnxConfig(str(student_artifact), str(student_artifact.parent / "floats"), images=5))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graph_equals_that_of_floats(
    student_artifact: Path, floats: Path, layout: str, precision: str, tmp_path: Path
) -> None:
    options = {"precision": precision, "input": "uint8", "layout": layout}
    path = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "uint8"), images=5, **options))  # type: ignore[arg-type]
    card, (graph, _) = load_artifact(path).card, load_onnx(path)
    shape = [3, 32, 32] if layout == "NCHW" else [32, 32, 3]
    assert [(spec.dtype, spec.shape) for spec in card.inputs] == [("uint8", ["batch", *shape])]
    images = _images(7)
    expected = run_graph(load_onnx(floats)[0], _normalise(floats, images))
    for embed in (lambda batch: run_graph(graph, batch, 3), openvino_forward(graph)):
        actual = embed(_lay_out(images, layout))
        assert parity(expected, actual)["cosine_min"] >= 0.99999
        if precision == "fp32":
            np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_uint8_graph_is_calibrated_quantised_compared_and_served(
    student_artifact: Path, floats: Path, uint8: Path, layout: str, catalog: Catalog, tmp_path: Path
) -> None:
    assert catalog.artifact is not None
    images = str(catalog.artifact.path)
    embedded = {}
    for name, graph in (("floats", floats), ("uint8", uint8)):
        ranges = calibrate(CalibrateConfig(str(graph), images, str(tmp_path / f"{name}-ranges"), count=16))
        int8 = export_int8(Int8Config(str(graph), str(ranges), str(tmp_path / name), scope="full", exclude_layers=()))
        build_engine(EngineConfig(str(int8), str(tmp_path / f"{name}-engine"), "tensorrt-rtx", "sm86"))
        batch = _normalise(floats, _images(7)) if name == "floats" else _lay_out(_images(7), layout)
        embedded[name] = run_graph(load_onnx(int8)[0], batch)
    assert parity(embedded["floats"], embedded["uint8"])["cosine_min"] >= 0.9999
    config = ParityConfig(
        str(student_artifact), (str(uint8), str(tmp_path / "uint8")), images, str(tmp_path / "parity"), layers=True
    )
    rows = json.loads((compare_exports(config) / "parity.json").read_text())
    assert rows[0]["cosine_min"] > 0.99999
    assert rows[0]["first_departing"] is None
    gallery = embed_catalog(EmbedConfig(str(student_artifact), images, str(tmp_path / "gallery"), split="test"))
    served = export_serving(ServingConfig(str(tmp_path / "uint8"), str(gallery), str(tmp_path / "serving")))
    written = (served / "model_repository" / "uint8" / "config.pbtxt").read_text()
    triton = text_format.Parse(written, ModelConfig())
    assert triton.input[0].data_type == DataType.TYPE_UINT8
    assert triton.input[0].format == getattr(ModelInput, f"FORMAT_{layout}")
    assert list(triton.input[0].dims) == ([3, 32, 32] if layout == "NCHW" else [32, 32, 3])
    assert triton.parameters["preprocess.value"].string_value == "pixel"
    assert '"UINT8"' in (served / "README.md").read_text()


def test_backends_take_the_input_of_the_card(uint8: Path, layout: str) -> None:
    vectors = []
    for model in models_of(uint8, ["onnxruntime-cpu", "openvino"]):
        batch = model.random_input(3)
        assert batch.dtype == np.uint8
        assert batch.shape == ((3, 3, 32, 32) if layout == "NCHW" else (3, 32, 32, 3))
        vectors.append(model.open(1)(batch))
    assert parity(*vectors)["cosine_min"] > 0.99999


def test_layout_of_floats_is_rejected() -> None:
    with pytest.raises(UserError, match="layout: NHWC needs a uint8 input"):
        OnnxConfig("student", "output", layout="NHWC")


def test_card_of_another_input_is_rejected(student_artifact: Path, floats: Path, tmp_path: Path) -> None:
    import shutil

    card = json.loads((floats / "card.json").read_text())
    shutil.copytree(floats, tmp_path / "graph")
    edit_card(tmp_path / "graph", preprocess={**card["preprocess"], "dtype": "uint8"})
    with pytest.raises(UserError, match=r"the one tensor 'pixels' of \(batch, 3, 32, 32\) uint8"):
        load_onnx(tmp_path / "graph")
    shutil.copytree(student_artifact, tmp_path / "student")
    edit_card(tmp_path / "student", preprocess={**card["preprocess"], "dtype": "uint8"})
    with pytest.raises(UserError, match="key 'preprocess': .*takes float32"):
        load_artifact(tmp_path / "student")


def test_fp16_graph_normalises_in_fp32(student_artifact: Path, tmp_path: Path) -> None:
    config = OnnxConfig(str(student_artifact), str(tmp_path / "half"), precision="fp16", images=1, input="uint8")
    graph, _ = load_onnx(export_onnx(config))
    constants = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert constants["normalise/scale"] == constants["normalise/offset"] == onnx.TensorProto.FLOAT
