"""Graphs whose weights are in a file of their own; the limit of 2 GB is lowered."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from export.backends.openvino_runtime import openvino_forward
from export.backends.registry import models_of
from export.config import EngineConfig, Int8Config, OnnxConfig, ServingConfig
from export.fp16 import to_fp16
from export.int8 import export_int8
from export.serving import export_serving
from export.tensorrt.build import build_engine
from export.to_onnx import export_onnx, load_onnx, run_graph
from student.embed import EmbedConfig, embed_catalog
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.inference import onnx_file
from vpr.inference.onnx_file import check_well_formed, infer_shapes, save_graph

LIMIT = 10_000


@pytest.fixture(scope="module")
def inline(student_artifact: Path) -> Path:
    return export_onnx(OnnxConfig(str(student_artifact), str(student_artifact.parent / "inline"), images=2))


@pytest.fixture(scope="module")
def exported(student_artifact: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "MAX_INLINE_BYTES", LIMIT)
        return export_onnx(OnnxConfig(str(student_artifact), str(student_artifact.parent / "external"), images=2))


@pytest.fixture
def _low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "MAX_INLINE_BYTES", LIMIT)


@pytest.fixture
def external(exported: Path, tmp_path: Path, _low_limit: None) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "external"))


def _pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


def test_weights_are_a_file_of_the_card(inline: Path, external: Path) -> None:
    files = load_artifact(external).card.files
    assert files["model.weights"].size > 100_000 > files["model.onnx"].size
    assert "model.weights" not in load_artifact(inline).card.files
    expected = run_graph(load_onnx(inline)[0], _pixels())
    # ONNX Runtime alone, as a server opens it.
    (actual,) = ort.InferenceSession(external / "model.onnx").run(None, {"pixels": _pixels()})
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    for model in models_of(external, ["onnxruntime-cpu", "openvino"]):
        np.testing.assert_allclose(model.open(1)(_pixels()), expected, atol=1e-5)
    np.testing.assert_allclose(openvino_forward(load_onnx(external)[0])(_pixels()), expected, atol=1e-5)


def test_graph_is_read_back_byte_by_byte(inline: Path, external: Path) -> None:
    read, written = load_onnx(external)[0], load_onnx(inline)[0]
    assert read.SerializeToString(deterministic=True) == written.SerializeToString(deterministic=True)


def test_external_graph_is_quantised_built_and_served(
    student_artifact: Path, external: Path, catalog: Catalog, tmp_path: Path
) -> None:
    from calibration.calibrate import calibrate
    from calibration.config import CalibrateConfig

    assert catalog.artifact is not None
    images = str(catalog.artifact.path)
    ranges = calibrate(CalibrateConfig(str(external), images, str(tmp_path / "ranges"), count=8, smooth=True))
    int8 = export_int8(Int8Config(str(external), str(ranges), str(tmp_path / "int8")))
    assert "model.weights" in load_artifact(int8).card.files
    engine = build_engine(EngineConfig(str(int8), str(tmp_path / "engine"), "tensorrt-rtx", "sm86"))
    assert load_artifact(engine).card.metrics["multiply_adds"] > 0
    gallery = embed_catalog(EmbedConfig(str(student_artifact), images, str(tmp_path / "gallery"), split="test"))
    served = export_serving(ServingConfig(str(external), str(gallery), str(tmp_path / "serving"), device="cpu"))
    folder = served / "model_repository" / "external" / "1"
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.weights"]
    (actual,) = ort.InferenceSession(folder / "model.onnx").run(None, {"pixels": _pixels()})
    np.testing.assert_allclose(actual, run_graph(load_onnx(external)[0], _pixels()), atol=1e-5)


@pytest.mark.usefixtures("_low_limit")
def test_shapes_and_precision_do_not_need_the_weights(inline: Path) -> None:
    graph = load_onnx(inline)[0]
    inferred = infer_shapes(graph, strict=True)
    expected = onnx.shape_inference.infer_shapes(graph, strict_mode=True)
    shapes = {value.name: str(value.type) for value in inferred.graph.value_info}
    assert shapes == {value.name: str(value.type) for value in expected.graph.value_info}
    half = to_fp16(graph)
    assert {tensor.data_type for tensor in half.graph.initializer if len(tensor.dims) == 2} == {TensorProto.FLOAT16}
    graph.graph.initializer[0].raw_data = b"\0" * 5000
    with pytest.raises(onnx.checker.ValidationError, match="bytes"):
        check_well_formed(graph)


def _edit(path: Path, change: Callable[[TensorProto], object]) -> None:
    """Change the entry of the first external weight, with the matching checksum."""
    graph = onnx.load(path / "model.onnx", load_external_data=False)
    change(next(tensor for tensor in graph.graph.initializer if tensor.data_location == TensorProto.EXTERNAL))
    data = graph.SerializeToString()
    (path / "model.onnx").write_bytes(data)
    card = json.loads((path / "card.json").read_text())
    card["files"]["model.onnx"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "card.json").write_text(json.dumps(card))


def _set(key: str, value: str) -> Callable[[TensorProto], object]:
    def change(tensor: TensorProto) -> None:
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("location", "../secret"), r"outside the artifact, in '\.\./secret'"),
        (_set("location", "/etc/passwd"), r"outside the artifact, in '/etc/passwd'"),
        (_set("location", "card.json"), "outside the artifact"),
        (_set("location", "./model.weights"), "outside the artifact"),
        (_set("offset", "99999999999"), "gives other bytes"),
        (_set("offset", "-4"), "not a number"),
        (_set("length", "8"), "gives other bytes"),
        (_set("length", ""), "not a number"),
        (lambda tensor: tensor.dims.append(2), "gives other bytes"),
        (lambda tensor: tensor.dims.append(-1), "negative dimension"),
    ],
)
def test_weights_elsewhere_are_rejected(external: Path, change: Callable[[TensorProto], object], message: str) -> None:
    _edit(external, change)
    with pytest.raises(UserError, match=message) as caught:
        load_onnx(external)
    assert str(caught.value).startswith(f"{external}: not a usable onnx (")
    assert "\n" not in str(caught.value)


def test_changed_missing_and_linked_weights_are_rejected(external: Path, tmp_path: Path) -> None:
    weights = external / "model.weights"
    content = bytearray(weights.read_bytes())
    content[5000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="checksum differs"):
        load_onnx(external)
    shutil.move(weights, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="missing"):
        load_onnx(external)
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a symbolic link"):
        load_onnx(external)


def test_weights_that_share_bytes_are_rejected(external: Path) -> None:
    """Many entries of one place would let a small file fill the memory."""
    graph = onnx.load(external / "model.onnx", load_external_data=False)
    entry = next(tensor for tensor in graph.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)
    for index in range(1000):
        copy = TensorProto()
        copy.CopyFrom(entry)
        copy.name = f"copy-{index}"
        graph.graph.initializer.append(copy)
    onnx.save(graph, external / "model.onnx")
    _edit(external, lambda tensor: None)
    with pytest.raises(UserError, match="its weights take more than"):
        load_onnx(external)


def test_small_graph_is_one_file(inline: Path, tmp_path: Path) -> None:
    save_graph(load_onnx(inline)[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
