"""Names of Hugging Face, written down from its models, against timm's and open_clip's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from teacher.naming import match_names, select_image_tower
from teacher.timm_tower import TimmTower
from teacher.weights import load_tower_weights
from vpr.common.errors import UserError

State = dict[str, Tensor]
_VIT = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_VIT_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_DINO_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_CLIP_BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def blocks(state: State, block: str, names: dict[str, str], query_key_value: tuple[str, str, str]) -> State:
    """Return the blocks of timm's ViT under Hugging Face's names, with separate query, key and value."""
    result = {}
    for index in range(sum(name.endswith("norm1.weight") for name in state)):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                result[f"{block}.{index}.{theirs}.{kind}"] = state[f"blocks.{index}.{ours}.{kind}"]
        for kind in ("weight", "bias"):
            for part, value in zip(query_key_value, state[f"blocks.{index}.attn.qkv.{kind}"].chunk(3), strict=True):
                result[f"{block}.{index}.{part}.{kind}"] = value
    return result


def vit(state: State) -> State:
    parts = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
    result = {theirs: state[ours] for theirs, ours in _VIT.items()} | blocks(state, "encoder.layer", _VIT_BLOCK, parts)  # type: ignore[arg-type]
    return {f"vit.{name}": value for name, value in result.items()} | {"classifier.weight": torch.zeros(3, 192)}


def dinov2(state: State) -> State:
    parts = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
    result = {theirs: state[ours] for theirs, ours in _VIT.items() if ours in state}
    result |= blocks(state, "encoder.layer", _DINO_BLOCK, parts)  # type: ignore[arg-type]
    for name in [name for name in state if ".ls" in name]:
        index, layer = name.split(".")[1], name.split(".ls")[1][0]
        result[f"encoder.layer.{index}.layer_scale{layer}.lambda1"] = state[name]
    width = state["cls_token"].shape[-1]
    result["embeddings.mask_token"] = torch.zeros(1, width)
    if "reg_token" in state:  # timm adds the position of the class token to the token
        result["embeddings.register_tokens"] = state["reg_token"]
        result["embeddings.position_embeddings"] = torch.cat([torch.zeros(1, 1, width), state["pos_embed"]], dim=1)
    return result


def clip(state: State) -> State:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    result = {
        "embeddings.class_embedding": state["cls_token"][0, 0],
        "embeddings.position_embedding.weight": state["pos_embed"][0],
        "embeddings.position_ids": torch.arange(state["pos_embed"].shape[1])[None],
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        **blocks(state, "encoder.layers", _CLIP_BLOCK, parts),
    }
    for theirs, ours in (("pre_layrnorm", "norm_pre"), ("post_layernorm", "norm")):
        result |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(())}
    return {f"vision_model.{name}": value for name, value in result.items()} | text


def siglip(state: State) -> State:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    result = {
        "embeddings.position_embedding.weight": state["pos_embed"][0],
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": state["patch_embed.proj.bias"],
        "head.probe": state["attn_pool.latent"],
        **blocks(state, "encoder.layers", _CLIP_BLOCK, parts),
    }
    for kind in ("weight", "bias"):
        result |= {
            f"post_layernorm.{kind}": state[f"norm.{kind}"],
            f"head.attention.in_proj_{kind}": torch.cat([state[f"attn_pool.{part}.{kind}"] for part in ("q", "kv")]),
            f"head.attention.out_proj.{kind}": state[f"attn_pool.proj.{kind}"],
            f"head.layernorm.{kind}": state[f"attn_pool.norm.{kind}"],
            f"head.mlp.fc1.{kind}": state[f"attn_pool.mlp.fc1.{kind}"],
            f"head.mlp.fc2.{kind}": state[f"attn_pool.mlp.fc2.{kind}"],
        }
    return {f"vision_model.{name}": value for name, value in result.items()} | {"logit_bias": torch.zeros(())}


def timm_tower(name: str, **changes: Any) -> TimmTower:
    """Return a tower with random weights, two blocks deep."""
    torch.manual_seed(0)
    tower = TimmTower(timm.create_model(name, num_classes=0, depth=2, **changes), 224)
    randomise(tower)
    return tower


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn_like(value))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("vit_tiny_patch16_224", vit),
        ("vit_small_patch14_dinov2", dinov2),
        ("vit_small_patch14_reg4_dinov2", dinov2),
        ("vit_base_patch32_clip_224", clip),
        ("vit_base_patch16_siglip_224", siglip),
    ],
)
def test_hugging_face_names_are_matched(name: str, write: Any) -> None:
    tower = timm_tower(name)
    expected = {key: value.clone() for key, value in tower.state_dict().items()}
    state = write({key: value.clone() for key, value in tower.trunk.state_dict().items()})
    randomise(tower)
    load_tower_weights(tower, select_image_tower({f"module.{key}": value for key, value in state.items()}))
    for key, value in tower.state_dict().items():
        assert torch.equal(value, expected[key]), key


def clip_tower(**changes: Any) -> open_clip.model.VisionTransformer:
    shape = {"image_size": 224, "patch_size": 32, "width": 768, "layers": 2, "heads": 12, "mlp_ratio": 4}
    tower = open_clip.model.VisionTransformer(**{**shape, "output_dim": 512, **changes})
    randomise(tower)
    return tower


def test_clip_names_of_all_libraries_give_one_tower() -> None:
    """timm's, open_clip's and Hugging Face's CLIP return the same embeddings from the same file."""
    ours, theirs = timm_tower("vit_base_patch32_clip_224"), clip_tower().eval()
    projection = torch.randn(512, 768)
    with torch.no_grad():  # of the size that training leaves, so that rounding is comparable
        for value in ours.parameters():
            value.mul_(0.05)
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = ours.eval()(x) @ projection.T
        for state in (
            {**clip(ours.trunk.state_dict()), "visual_projection.weight": projection},
            {**ours.trunk.state_dict(), "head.weight": projection, "head.bias": torch.zeros(512)},
        ):
            randomise(theirs)
            load_tower_weights(theirs, select_image_tower(state))
            torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-4)
        back = timm_tower("vit_base_patch32_clip_224")
        load_tower_weights(back, select_image_tower({f"visual.{n}": v for n, v in theirs.state_dict().items()}))
        assert torch.equal(back(x), ours(x))


def test_other_networks_are_rejected_with_the_names() -> None:
    tower, state = timm_tower("vit_tiny_patch16_224"), timm_tower("vit_tiny_patch16_224").trunk.state_dict()
    rest = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    with pytest.raises(UserError, match=r"lack 'trunk\.blocks\.1\.attn\.proj\.bias', .* and 9 more\. Set tower\.name"):
        load_tower_weights(tower, rest)
    with pytest.raises(UserError, match=r"have 'trunk\.blocks\.2\.norm1\.bias'\. Set tower\.name"):
        load_tower_weights(tower, {**state, "blocks.2.norm1.bias": torch.zeros(192)})
    with pytest.raises(
        UserError, match=r"differ in the shape of 'trunk\.blocks\.0\.attn\.proj\.bias', .* and \d+ more"
    ):
        load_tower_weights(tower, timm_tower("vit_tiny_patch16_224", embed_dim=96).trunk.state_dict())
    with pytest.raises(UserError, match=r"differ in the shape of 'trunk\.patch_embed\.proj\.weight'"):
        load_tower_weights(tower, timm_tower("vit_tiny_patch16_224", patch_size=32).trunk.state_dict())
    with pytest.raises(UserError, match=r"lack the projection 'proj'\. Set tower\.keep_projection to false"):
        load_tower_weights(clip_tower(), {n: v for n, v in clip_tower().state_dict().items() if n != "proj"})


@pytest.mark.parametrize(
    "prefixes",
    ["visual.", "module.visual.", "model.module.visual.", "backbone.", "image_encoder.model.", "visual.trunk."],
)
def test_prefixes_are_removed(prefixes: str) -> None:
    state = {f"{prefixes}{name}": torch.zeros(1) for name in ("norm.weight", "blocks.0.norm1.bias")}
    selected = select_image_tower(state)
    matched = match_names(nn.Module(), selected)
    assert {name.removeprefix("trunk.") for name in matched} == {"norm.weight", "blocks.0.norm1.bias"}


def test_text_tower_is_left_out(tmp_path: Path) -> None:
    state = {"text.transformer.x": torch.zeros(1), "logit_scale": torch.zeros(1), "stem.weight": torch.ones(1)}
    save_file(state, tmp_path / "clip.safetensors")
    assert select_image_tower(state).keys() == {"stem.weight"}
