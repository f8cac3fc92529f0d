"""Teachers of every kind of tower, exported and used like students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.random_teacher import write_random_teacher
from export.config import EngineConfig, Int8Config, OnnxConfig, ParityConfig, ServingConfig
from export.int8 import export_int8
from export.parity_report import compare_exports
from export.serving import export_serving
from export.tensorrt.build import build_engine
from export.to_onnx import export_onnx
from teacher.config import FuseConfig, TowerConfig
from teacher.embed import EmbedConfig, embed_catalog
from teacher.fuse import fuse
from teacher.model import load_teacher
from tests.teacher.test_fuse import LARGE, write_teacher
from tests.teacher.test_fuse import SMALL as PART
from vpr.artifacts.store import load_artifact
from vpr.cli import main
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog

# open_clip's ResNet ends in an attention over the pixels.
_CLIP_RESNET = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
}
_QUICK_VIT = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
}
SMALL = {
    "open_clip ViT": TowerConfig("sample-vit", "", embedding_dim=32, batch_norm=True),
    "open_clip ViT with QuickGELU": _QUICK_VIT,
    "open_clip ResNet": _CLIP_RESNET,
    "ResNet": TowerConfig("timm/test_resnet", "", image_size=64),
    "ResNet through open_clip": TowerConfig("sample", "", image_size=64),
    "ConvNeXt": TowerConfig("timm/test_convnext", "", image_size=64),
    "EfficientNet": TowerConfig("timm/test_efficientnet", "", image_size=64),
    "ViT of timm": TowerConfig("timm/test_vit", "", image_size=64),
    "SigLIP's attention pooling": TowerConfig("timm/test_vit3", "", image_size=64),
    "MobileCLIP's FastViT": TowerConfig("timm/fastvit_t8", "", image_size=64),
}
_SHORT = ("open_clip ViT", "ResNet")  # in make test; a trace takes 3 seconds
PUBLISHED = (
    *("open_clip/ViT-B-16", "open_clip/ViT-L-14", "open_clip/ViT-B-16-SigLIP", "open_clip/convnext_base_w"),
    *("open_clip/RN50", "timm/tf_efficientnet_lite0", "timm/resnet50", "open_clip/MobileCLIP-S1"),
)


def _write(folder: Path, tower: TowerConfig | dict[str, Any]) -> Path:
    if isinstance(tower, dict):
        (folder / "tower.json").write_text(json.dumps(tower))
        tower = TowerConfig(str(folder / "tower.json"), "")
    return write_random_teacher(folder / "teacher", tower)


def _check_equal_to_pytorch(graph: Path, teacher: Path) -> None:
    """Compare a graph, by ONNX Runtime alone, with the teacher on other images than the export."""
    model, artifact = load_teacher(teacher)
    assert artifact.card.preprocess is not None
    size = artifact.card.preprocess.size
    pixels = np.random.default_rng(1).normal(size=(3, 3, size, size)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()
    (actual,) = ort.InferenceSession(graph / "model.onnx").run(None, {"pixels": pixels})
    assert np.abs(actual - expected).max() <= 1e-4
    assert load_artifact(graph).card.parents == [artifact.as_parent("teacher")]


@pytest.mark.parametrize(
    "tower",
    [pytest.param(tower, id=name, marks=() if name in _SHORT else pytest.mark.slow) for name, tower in SMALL.items()],
)
def test_every_tower_is_exported_and_its_fp16_graph_builds(tower: TowerConfig | dict[str, Any], tmp_path: Path) -> None:
    teacher = _write(tmp_path, tower)
    graph = export_onnx(OnnxConfig(str(teacher), str(tmp_path / "fp32"), images=5))
    _check_equal_to_pytorch(graph, teacher)
    # TensorRT has no kernel for the one-query Attention node of attention pooling: opset 20 spells it out.
    opset: Literal[20, 23] = 20 if tower == SMALL["SigLIP's attention pooling"] else 23
    config = OnnxConfig(str(teacher), str(tmp_path / "fp16"), precision="fp16", images=5, opset=opset)
    half = export_onnx(config)
    assert load_artifact(half).card.metrics["cosine_min"] > 0.9999
    engine = build_engine(EngineConfig(str(half), str(tmp_path / "engine"), "tensorrt-rtx", "sm86,sm120"))
    assert load_artifact(engine).card.metrics["precision"] == "fp16"


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_exported(name: str, tmp_path: Path) -> None:
    teacher = _write(tmp_path, TowerConfig(name, ""))
    _check_equal_to_pytorch(export_onnx(OnnxConfig(str(teacher), str(tmp_path / "fp32"), images=2)), teacher)
    opset: Literal[20, 23] = 20 if "SigLIP" in name else 23  # TensorRT has no kernel for its attention pooling in 23
    half = export_onnx(OnnxConfig(str(teacher), str(tmp_path / "fp16"), precision="fp16", images=2, opset=opset))
    build_engine(EngineConfig(str(half), str(tmp_path / "engine"), "tensorrt-rtx", "sm86"))


@pytest.mark.slow
def test_graph_above_2_gb_is_exported_with_its_weights_beside_it_and_builds(tmp_path: Path) -> None:
    teacher = _write(tmp_path, TowerConfig("open_clip/ViT-H-14", ""))
    graph = export_onnx(OnnxConfig(str(teacher), str(tmp_path / "fp32"), images=1))
    files = load_artifact(graph).card.files
    assert files["model.weights"].size > 2**31
    assert files["model.onnx"].size < 10_000_000
    _check_equal_to_pytorch(graph, teacher)
    half = export_onnx(OnnxConfig(str(teacher), str(tmp_path / "fp16"), precision="fp16", images=1))
    engine = build_engine(EngineConfig(str(half), str(tmp_path / "engine"), "tensorrt-rtx", "sm89"))
    assert load_artifact(engine).file("engine.plan").stat().st_size > 2**30


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("teacher"), TowerConfig("timm/test_vit", "", image_size=32))


@pytest.fixture(scope="module")
def graph(teacher: Path) -> Path:
    return export_onnx(OnnxConfig(str(teacher), str(teacher.parent / "fp32"), images=5))


def test_teacher_is_calibrated_quantised_compared_and_served(
    teacher: Path, graph: Path, catalog: Catalog, tmp_path: Path
) -> None:
    assert catalog.artifact is not None
    images = str(catalog.artifact.path)
    ranges = calibrate(CalibrateConfig(str(graph), images, str(tmp_path / "ranges"), count=16, smooth=True))
    int8 = export_int8(Int8Config(str(graph), str(ranges), str(tmp_path / "int8"), base="fp32"))
    config = ParityConfig(str(teacher), (str(graph), str(int8)), images, str(tmp_path / "parity"), layers=True)
    exact, quantised = json.loads((compare_exports(config) / "parity.json").read_text())
    assert exact["cosine_min"] > 0.999999
    assert exact["first_departing"] is None
    assert 0.98 < quantised["cosine_min"] < exact["cosine_min"]
    gallery = embed_catalog(EmbedConfig(str(teacher), images, str(tmp_path / "gallery"), split="test"))
    served = export_serving(ServingConfig(str(int8), str(gallery), str(tmp_path / "serving"), device="cpu"))
    assert (served / "model_repository" / "int8" / "1" / "model.onnx").is_file()
    assert [parent.role for parent in load_artifact(int8).card.parents] == ["onnx", "ranges", "teacher"]


def test_unchanged_teacher_is_not_exported_again_and_the_older_flag_works(
    teacher: Path, graph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (graph / "card.json").stat().st_mtime_ns
    for flag in ("--model", "--student"):
        main(["export", "onnx", flag, str(teacher), "--output", str(graph), "--images", "5"])
    assert (graph / "card.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out.split() == [str(graph)] * 2


@pytest.mark.slow
def test_fused_teacher_of_two_image_sizes_is_exported(catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    parts = [write_teacher(tmp_path / str(seed), config, catalog, seed) for seed, config in enumerate((LARGE, PART))]
    fused = fuse(FuseConfig(tuple(parts), str(catalog.artifact.path), str(tmp_path / "fused"), 6, steps=20))
    graph = export_onnx(OnnxConfig(str(fused), str(tmp_path / "fp32"), images=5))
    _check_equal_to_pytorch(graph, fused)
    half = export_onnx(OnnxConfig(str(fused), str(tmp_path / "fp16"), precision="fp16", images=5))
    assert load_artifact(half).card.metrics["cosine_min"] > 0.999


def test_other_artifacts_are_rejected(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected an artifact of kind teacher or student, got onnx"):
        export_onnx(OnnxConfig(str(graph), str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()


def test_nodes_are_named_by_the_modules_of_the_teacher(graph: Path) -> None:
    names = [node.name for node in onnx.load(graph / "model.onnx").graph.node]
    assert "visual.trunk.blocks.0.attn.qkv/MatMul" in names
    assert not any(name.startswith("student") for name in names)
