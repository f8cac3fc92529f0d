"""Small ViTs of timm and open_clip with random values in every parameter, for starts of students."""

from __future__ import annotations

from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn

from teacher.timm_tower import TimmTower

# Names, and settings that make the networks small without changing their kind.
TIMM: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"img_size": 48},
    "deit_small_patch16_224": {"img_size": 32},
    "deit3_small_patch16_224": {"img_size": 48},
    "vit_tiny_patch16_224": {"img_size": 48},
    "vit_small_patch16_224": {"img_size": 32, "global_pool": "avg"},
    "vit_small_patch14_dinov2": {"img_size": 42},
    "vit_small_patch14_reg4_dinov2": {"img_size": 42},
    "vit_xsmall_patch16_clip_224": {"img_size": 48},  # TinyCLIP
    "vit_medium_patch32_clip_224": {"img_size": 96},  # TinyCLIP
    "vit_base_patch16_clip_quickgelu_224": {"img_size": 32, "embed_dim": 192, "num_heads": 3},
    "vit_base_patch16_siglip_224": {"img_size": 48, "embed_dim": 192, "num_heads": 3},
    "vit_base_patch16_siglip_gap_256": {"img_size": 48, "embed_dim": 192, "num_heads": 3, "act_layer": "gelu_tanh"},
}
OPEN_CLIP = ("ViT-B-32", "ViT-B-16", "ViT-B-32-quickgelu", "ViT-B-16-quickgelu")
_TOKENS = ("pos_embed", "token", "latent", "class_embedding", "positional_embedding")


def timm_tower(name: str, **settings: Any) -> TimmTower:
    """Return a tower of two blocks, unless the settings have another depth."""
    values = {"depth": 2, **TIMM.get(name, {}), **settings}
    trunk = timm.create_model(name, num_classes=0, **values)
    return randomise(TimmTower(trunk, values.get("img_size", 224)))


def open_clip_tower(name: str, width: int = 192, layers: int = 2, **vision: Any) -> Any:
    """Return an image tower with the patches and the activation of a model of open_clip."""
    config = open_clip.get_model_config(name)
    patch = config["vision_cfg"]["patch_size"]
    vision = {**config["vision_cfg"], "width": width, "layers": layers, "image_size": 3 * patch, **vision}
    text = {"context_length": 4, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}
    clip = open_clip.model.CLIP(96, vision, text, quick_gelu=config.get("quick_gelu", False))  # type: ignore[arg-type]
    return randomise(clip.visual)


def randomise(module: Any) -> Any:
    """Draw all parameters so that each changes the output, and the activations stay near 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith(_TOKENS):
                value.copy_(0.5 * noise)
            elif value.ndim > 1:
                value.copy_(noise * value[0].numel() ** -0.5)
            else:
                value.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))
    return module.eval()


def library_features(visual: Any, x: Tensor) -> Tensor:
    """Return the pooled features before the projection, as the library computes them."""
    proj, visual.proj = getattr(visual, "proj", None), None
    with torch.no_grad():
        features: Tensor = getattr(visual, "trunk", visual)(x)
    visual.proj = proj
    return features


def student_features(student: Any, x: Tensor) -> Tensor:
    """Return the pooled features before the head of a student."""
    head, student.vit.mlp_head = student.vit.mlp_head, nn.Identity()
    with torch.no_grad():
        features: Tensor = student.eval().vit(x)
    student.vit.mlp_head = head
    return features
