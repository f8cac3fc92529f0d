"""Tokens of towers against what their libraries return for the same images."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from teacher.fused import FusedTeacher, WhitenedPart
from teacher.model import Teacher, build_teacher, read_tower
from teacher.timm_tower import TimmTower
from teacher.tokens import NoGridError, TokenGrid, find_tap, measure_grid
from teacher.tower_config import TowerConfig
from tests.student.towers import open_clip_tower, randomise

RANDOM = TowerConfig("sample-vit", "")
# Settings that make the networks small.
TIMM: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": {"img_size": 48, "depth": 2},
    "vit_small_patch14_reg4_dinov2": {"img_size": 42, "depth": 2},
    "vit_base_patch16_siglip_224": {"img_size": 48, "depth": 2, "embed_dim": 192, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": {"img_size": 48, "depth": 2},
    "eva02_tiny_patch14_224": {"img_size": 42, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "window_size": 7, "depths": (1, 1), "num_heads": (3, 6)},
    "levit_128s": {"img_size": 96},
    "hiera_tiny_224": {"img_size": (64, 64), "stages": (1, 1, 1, 1), "embed_dim": 24},
    "convnext_atto": {},
    "resnet10t": {},
}
# The last features of these networks are not their last intermediate ones.
CONVOLUTIONS = ["mobilenetv3_small_050", pytest.param("tf_efficientnet_lite0", marks=pytest.mark.slow)]


def teacher_of(visual: Any, width: int) -> Teacher:
    return Teacher(visual, width, RANDOM).eval()


def random_images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def record(teacher: Teacher, x: Tensor) -> Tensor:
    """Return the tokens of a pass, and check that the embedding is the same as without recording them."""
    tap, maps = find_tap(teacher), []
    with torch.inference_mode():
        expected = teacher(x)
        with tap.watch(maps.append):
            embedding = teacher(x)
        assert torch.equal(embedding, expected)
        assert torch.equal(teacher(x), expected)
    assert len(maps) == 1  # of the pass inside the block alone
    assert measure_grid(teacher, tap, x.shape[-1]) == TokenGrid(*maps[0].shape[2:], maps[0].shape[1])
    return maps[0]


@pytest.mark.parametrize("name", TIMM)
def test_tokens_equal_intermediates_of_timm(name: str) -> None:
    settings = TIMM[name]
    trunk: Any = randomise(timm.create_model(name, num_classes=0, **settings))
    size = settings.get("img_size", 64)
    x = random_images(size if isinstance(size, int) else size[0])
    tokens = record(teacher_of(TimmTower(trunk, x.shape[-1]), trunk.num_features), x)
    with torch.inference_mode():
        has_norm = name != "hiera_tiny_224"  # Hiera norms after its pooling
        expected = trunk.forward_intermediates(x, indices=1, norm=has_norm, intermediates_only=True)[-1]
    assert tokens.shape[2] > 1
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_tokens_equal_features_of_timm(name: str) -> None:
    trunk: Any = timm.create_model(name, num_classes=0).eval()
    x = random_images(64)
    tokens = record(teacher_of(TimmTower(trunk, 64), 1), x)
    with torch.inference_mode():
        assert torch.equal(tokens, trunk.forward_features(x))


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"attentional_pool": True, "attn_pooler_queries": 5},
    ],
    ids=["class", "mean", "coca"],
)
def test_tokens_equal_intermediates_of_open_clip(vision: dict[str, Any]) -> None:
    visual = open_clip_tower("ViT-B-16", **vision)
    x = random_images(48)
    tokens = record(teacher_of(visual, 96), x)
    has_norm = "attentional_pool" not in vision  # CoCa's norm follows its pooling and has another width
    with torch.inference_mode():
        output = visual.forward_intermediates(x, indices=1, normalize_intermediates=has_norm, intermediates_only=True)
    assert tokens.shape == (2, 192, 3, 3)
    torch.testing.assert_close(tokens, output["image_intermediates"][-1], atol=1e-5, rtol=1e-5)


def test_tokens_of_a_resnet_of_open_clip_precede_the_attention_pooling() -> None:
    visual = open_clip.modified_resnet.ModifiedResNet([1, 1, 1, 1], 24, 4, image_size=64, width=8).eval()
    x = random_images(64)
    tokens = record(teacher_of(visual, 24), x)
    with torch.inference_mode():
        expected = visual.forward_intermediates(x, indices=1, intermediates_only=True)["image_intermediates"][-1]
    assert tokens.shape == (2, 256, 2, 2)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(("name", "grid"), [("sample", (3, 3, 512)), ("sample-vit", (8, 8, 128))])
def test_towers_of_the_samples(name: str, grid: tuple[int, int, int]) -> None:
    """The tower ``sample`` is a model of timm inside open_clip's adapter."""
    teacher, preprocess = build_teacher(TowerConfig(name, ""), read_tower(name), False)
    assert measure_grid(teacher.eval(), find_tap(teacher), preprocess.size) == TokenGrid(*grid)
    record(teacher, random_images(preprocess.size))


def test_overlapping_patches_have_a_finer_grid() -> None:
    config = TowerConfig("sample-vit", "", patch_stride=4)
    teacher, preprocess = build_teacher(config, read_tower("sample-vit"), False)
    assert measure_grid(teacher.eval(), find_tap(teacher), preprocess.size) == TokenGrid(15, 15, 128)


def test_one_pass_gives_embedding_and_tokens() -> None:
    visual, calls = open_clip_tower("ViT-B-16"), []
    teacher = teacher_of(visual, 96)
    for layer in (visual.conv1, visual.transformer):
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    with torch.inference_mode(), find_tap(teacher).watch(lambda _: None):
        teacher(random_images(48))
    assert calls == [visual.conv1, visual.transformer]


def test_an_error_in_the_pass_leaves_the_network_as_it_was() -> None:
    teacher = teacher_of(TimmTower(timm.create_model("resnet10t", num_classes=0), 64), 512)
    tap = find_tap(teacher)
    before = dict(vars(tap.owner))
    with pytest.raises(RuntimeError), tap.watch(lambda _: None):
        teacher(torch.zeros(1, 5, 64, 64))
    assert vars(tap.owner) == before


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "coat_tiny"])
def test_features_without_a_grid(name: str) -> None:
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0).eval()
    teacher = teacher_of(TimmTower(trunk, 240), 1)
    with pytest.raises(NoGridError, match="its features are no grid"):
        measure_grid(teacher, find_tap(teacher), trunk.default_cfg["input_size"][1])


def test_joined_teachers_have_no_grid() -> None:
    single, preprocess = build_teacher(RANDOM, read_tower("sample-vit"), False)
    parts = [WhitenedPart(single, 128, preprocess, preprocess) for _ in range(2)]
    with pytest.raises(NoGridError, match="it joins several networks"):
        find_tap(FusedTeacher(parts, 0))
    with pytest.raises(NoGridError, match="unknown kind"):
        find_tap(nn.Identity())
