from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from teacher import timm_tower, weights
from teacher.model import build_teacher, load_teacher, read_tower
from teacher.tower_config import TowerConfig
from vpr.artifacts.card import Embedding
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess

IMAGENET = (0.485, 0.456, 0.406)


def preprocess_of(name: str, pretrained: str = "", **changes: Any) -> Preprocess:
    """Return the preprocessing of a tower without allocating it."""
    return build_teacher(TowerConfig(name, pretrained, **changes), read_tower(name), False, "meta")[1]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("timm/resnet10x", "timm/resnet10t"),
        ("resnet10t", "timm/resnet10t"),
        ("open_clip/ViT-B-33", "ViT-B-32"),
        ("timm/ViT-B-16-SigLIP", "ViT-B-16-SigLIP"),
        ("timm/hf-hub:a/b", ""),
    ],
)
def test_unknown_name_gives_the_nearest_ones(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is no .*{nearest}") as caught:
        read_tower(name)
    assert "\n" not in str(caught.value)


def test_unknown_tag_gives_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"tower\.name: timm/resnet18 has no tag 'b1'\. Choose from: .*a1_in1k"):
        read_tower("timm/resnet18.b1")
    with pytest.raises(UserError, match=r"tower\.pretrained: timm/resnet18 has no tag 'b1'\. Choose from: .*a1_in1k"):
        preprocess_of("timm/resnet18", "b1")


def test_library_prefix_of_open_clip_is_optional() -> None:
    assert read_tower("open_clip/ViT-B-32") == read_tower("ViT-B-32")
    assert preprocess_of("open_clip/ViT-B-32", "laion2b_s34b_b79k").size == 224


def test_tower_has_the_preprocessing_of_its_library() -> None:
    dino = preprocess_of("timm/vit_small_patch14_dinov2", "lvd142m")
    assert (dino.size, dino.mean, dino.interpolation, dino.crop_pct) == (518, IMAGENET, "bicubic", 1.0)
    cropped = preprocess_of("timm/mobilenetv3_small_050", squash=False)
    assert (cropped.resize, cropped.crop, cropped.crop_pct) == ("shortest", "center", 0.875)
    siglip = preprocess_of("open_clip/ViT-B-16-SigLIP")
    assert siglip.mean == siglip.std == (0.5, 0.5, 0.5)
    assert preprocess_of("timm/resnet18.tv_in1k").interpolation == "bilinear"
    assert preprocess_of("timm/resnet18", "a1_in1k").interpolation == "bicubic"


def test_statistics_that_differ_between_published_weights_are_required() -> None:
    with pytest.raises(
        UserError, match=r"tower\.interpolation: .*Set tower\.interpolation or add the tag to tower\.name"
    ):
        preprocess_of("timm/resnet18", "file.safetensors")
    with pytest.raises(
        UserError, match=r"tower\.mean: .*published weights of ViT-L-14 differ in it\. Set tower\.mean\."
    ):
        preprocess_of("ViT-L-14", "file.safetensors")
    named = preprocess_of("timm/resnet18.tv_in1k", "file.safetensors")
    assert named.interpolation == "bilinear"
    given = preprocess_of("timm/resnet18", "file.safetensors", interpolation="bicubic", mean=(0.1, 0.2, 0.3))
    assert (given.interpolation, given.mean) == ("bicubic", (0.1, 0.2, 0.3))


@pytest.mark.parametrize("values", [(0.5, 0.5), (0.5, 0.5, 11.0), (0.5, 0.5, float("nan"))])
def test_invalid_statistics_are_rejected(values: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"tower\.mean: expected three numbers"):
        TowerConfig(mean=values)


def test_image_size_of_timm_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preprocess_of("timm/convnext_atto", image_size=96).size == 96
    assert preprocess_of("timm/vit_tiny_patch16_224", image_size=96).size == 96
    tower = read_tower("timm/test_vit")
    monkeypatch.setattr(timm_tower, "_output_width", lambda trunk, size: {}["windows of 7 do not divide the features"])
    with pytest.raises(
        UserError, match=r"tower\.image_size: timm/test_vit does not take images of 100 pixels\. Set it to 0"
    ):
        build_teacher(TowerConfig("timm/test_vit", "", image_size=100), tower, False, "meta")


def test_settings_that_a_timm_tower_lacks_are_rejected() -> None:
    with pytest.raises(UserError, match="has no projection to remove"):
        preprocess_of("timm/resnet18", keep_projection=False)
    with pytest.raises(UserError, match="is no ViT with position embeddings"):
        preprocess_of("timm/resnet18", patch_stride=8)
    with pytest.raises(UserError, match=r"expects 3 channels, \d+x\d+ pixels, not a square RGB image"):
        read_tower("timm/vit_base_patch16_sapiens2")


def test_teacher_of_a_timm_tower_is_loaded_and_initialises_another(tmp_path: Path) -> None:
    config = TowerConfig("timm/test_vit", "", image_size=64, embedding_dim=16)
    tower = read_tower(config.name)
    torch.manual_seed(0)
    teacher, preprocess = build_teacher(config, tower, load_pretrained=False)
    with write_artifact(tmp_path / "first", "teacher", {"network": asdict(config), "tower_config": tower}) as writer:
        save_file(teacher.state_dict(), writer.path / "model.safetensors")
        writer.preprocess, writer.embedding = preprocess, Embedding(dim=16, normalised=True, dtype="float32")
    x = torch.randn(2, 3, 64, 64)
    loaded, _ = load_teacher(tmp_path / "first")
    start = TowerConfig("timm/test_vit", str(tmp_path / "first"), image_size=64, embedding_dim=16)
    second, _ = build_teacher(start, tower, load_pretrained=True)
    assert torch.equal(loaded(x), teacher.eval()(x))
    assert torch.equal(second.eval()(x), teacher(x))
    with pytest.raises(UserError, match="has another tower than timm/test_vit2"):
        build_teacher(TowerConfig("timm/test_vit2", str(tmp_path / "first")), read_tower("timm/test_vit2"), False)


def test_timm_tag_is_loaded_by_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    published = timm.create_model("test_vit", num_classes=0)
    calls: list[tuple[str, dict[str, Any]]] = []

    def create(name: str, **options: Any) -> torch.nn.Module:
        calls.append((name, options))
        return published

    config = TowerConfig("timm/test_vit", "r160_in1k")
    with monkeypatch.context() as patch:
        state = published.state_dict()
        patch.setattr("teacher.model.download_timm", lambda model, tag: calls.append((model, {"tag": tag})) or state)
        teacher, _ = build_teacher(config, read_tower(config.name), load_pretrained=True)
    assert calls == [("test_vit", {"tag": "r160_in1k"})]
    assert torch.equal(teacher.visual.trunk.state_dict()["pos_embed"], published.state_dict()["pos_embed"])
    monkeypatch.setattr(timm, "create_model", create)
    assert weights.download_timm("test_vit", "r160_in1k").keys() == published.state_dict().keys()
    assert calls[-1] == ("test_vit.r160_in1k", {"pretrained": True, "num_classes": 0})


def test_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, **options: Any) -> torch.nn.Module:
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match=r"cannot load timm/test_vit\.r160_in1k \(OSError: no route to host\)\. Check"):
        weights.download_timm("test_vit", "r160_in1k")


@pytest.mark.parametrize("projection", ["", None])
def test_tower_without_pooling_is_rejected(projection: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tower.json"
    vision = {"timm_model_name": "resnet10t", "timm_pool": "", "timm_proj": projection, "image_size": 32}
    path.write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision}), encoding="utf-8")
    with pytest.raises(UserError, match=r"tower\.name: .*timm_pool: '' pools nothing.*Set it to avg or max"):
        read_tower(str(path))
