"""Towers of timm and open_clip against the pipelines of these libraries, from the image file to the embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from teacher.layers import group_by_depth
from teacher.model import Teacher, build_teacher, read_tower
from teacher.preprocessing import published_values, tower_preprocess
from teacher.tower_config import TowerConfig
from teacher.weights import load_tower_weights, read_tower_weights
from vpr.imaging.decode import decode
from vpr.imaging.preprocess import Preprocess

TOLERANCE = 1e-5
FAST = ["test_vit", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto", "regnetx_002", "levit_128s"]
SLOW = [
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "resnet18.a1_in1k", "mobilevit_xxs", "mobilevitv2_050",
    "efficientformer_l1", "coatnet_nano_rw_224", "maxvit_tiny_tf_224", "xcit_nano_12_p16_224", "cait_xxs24_224",
    "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3",
    "vit_base_patch16_siglip_224", "vit_base_patch32_clip_224", "hiera_tiny_224", "fastvit_t8", "fastvit_mci0",
    "tiny_vit_5m_224", "davit_tiny", "poolformer_s12", "ghostnet_050", "hrnet_w18_small.ms_in1k", "pvt_v2_b0",
    "edgenext_xx_small", "repvgg_a0", "densenet121", "pit_ti_224", "mixer_s32_224",
]  # fmt: skip
OPEN_CLIP = ["RN50", "ViT-B-32", "convnext_base", "ViT-B-16-SigLIP", "MobileCLIP-S1", "EVA02-B-16"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """PNG and JPEG files of other shapes than the towers' inputs."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / "wide.png", folder / "tall.jpg"]
    for path, size in zip(paths, [(310, 240), (250, 333)], strict=True):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
    return paths


def randomise(model: nn.Module) -> None:
    """Change all weights and statistics, so that layers initialised as zeros or ones matter too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                value.uniform_(0.7, 1.3)
            elif isinstance(value, nn.Parameter) or name.endswith("running_mean"):
                value.add_(0.02 * torch.randn_like(value))


def compare(teacher: Teacher, preprocess: Preprocess, images: list[Path], library: Callable[[Path], Tensor]) -> float:
    """Return the largest difference between the teacher's embeddings and the library's, (1, dim) for each image."""
    pixels = np.stack([preprocess.pixels(decode(path, shortest=preprocess.size)) for path in images])
    with torch.inference_mode():
        ours = teacher.eval()(torch.from_numpy(preprocess.normalise(pixels)))
        theirs = torch.cat([nn.functional.normalize(library(path), dim=1) for path in images])
    assert theirs.std() > 0.001
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def save(path: Path, state: dict[str, Tensor], prefix: str = "", **others: Tensor) -> Path:
    save_file({**{f"{prefix}{name}": value.clone() for name, value in state.items()}, **others}, path)
    return path


def assert_loads(teacher: Teacher, path: Path, expected: dict[str, Tensor]) -> None:
    """Load a file into the tower and compare all its tensors."""
    with torch.no_grad():
        for value in teacher.visual.parameters():
            value.zero_()
    load_tower_weights(teacher.visual, read_tower_weights(path))
    for name, value in teacher.visual.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_timm_tower_equals_timm(name: str, images: list[Path], tmp_path: Path) -> None:
    reference = timm.create_model(name, num_classes=7)
    randomise(reference)
    with_classifier = reference.state_dict()
    reference.reset_classifier(0)
    file = save(tmp_path / "timm.safetensors", with_classifier)
    config = TowerConfig(f"timm/{name}", str(file), squash=False)
    tower = read_tower(config.name)
    teacher, preprocess = build_teacher(config, tower, load_pretrained=True)
    assert len(group_by_depth(teacher)) > 2

    values = resolve_model_data_config(reference)
    squashed = tower_preprocess(replace(config, squash=True), preprocess.size, published_values(name, tower, True))
    for ours, changes in ((preprocess, {"crop_mode": "center"}), (squashed, {"crop_mode": "squash", "crop_pct": 1.0})):
        transform: Any = create_transform(**{**values, **changes})
        library = reference.eval()
        difference = compare(
            teacher,
            ours,
            images,
            lambda path: library(transform(Image.open(path).convert("RGB"))[None]),  # noqa: B023
        )
        assert difference <= TOLERANCE

    loaded = {key: value.clone() for key, value in teacher.visual.state_dict().items()}
    for prefix in ("visual.trunk.", "module.", "module.model.", "trunk.", "image_encoder.model."):
        assert_loads(
            teacher, save(file, with_classifier, prefix, **{"text.x": torch.zeros(1)} if "v" in prefix else {}), loaded
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_tower_equals_open_clip(name: str, images: list[Path], tmp_path: Path) -> None:
    clip: Any = open_clip.create_model(name, load_weights=False)
    randomise(clip.visual)
    state = clip.visual.state_dict()
    file = save(tmp_path / "clip.safetensors", state, "visual.", logit_scale=torch.ones(()))
    config = TowerConfig(f"open_clip/{name}", str(file), squash=False)
    teacher, preprocess = build_teacher(config, read_tower(config.name), load_pretrained=True)

    tag = open_clip.get_pretrained_cfg(name, open_clip.list_pretrained_tags_by_model(name)[0])
    statistics = {key: tag[key] for key in ("mean", "std", "interpolation")}
    squashed = preprocess.model_copy(update={"resize": "squash", "crop": "none"})
    for ours, mode in ((preprocess, "shortest"), (squashed, "squash")):
        transform: Any = open_clip.image_transform(preprocess.size, False, resize_mode=mode, **statistics)
        difference = compare(
            teacher,
            ours,
            images,
            lambda path: clip.eval().encode_image(transform(Image.open(path))[None]),  # noqa: B023
        )
        assert difference <= TOLERANCE

    loaded = {key: value.clone() for key, value in teacher.visual.state_dict().items()}
    for prefix in ("", "module.visual.", "model.visual."):
        assert_loads(teacher, save(file, state, prefix), loaded)
