"""Names of weights: those of timm, open_clip and Hugging Face, and the prefixes that trainers add."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

# Removed if all names have it: DDP and the attribute of a trainer.
_WRAPPERS = ("module.", "model.")
_COMPILED = "_orig_mod."  # of torch.compile, wherever a compiled part is in the network
# If some names have it, the other tensors belong to a text tower or a head.
_IMAGE_TOWERS = (
    "visual.", "image_encoder.", "vision_model.", "vision_tower.", "backbone.",
    "vit.", "deit.", "dinov2.", "dinov2_with_registers.",
)  # fmt: skip
_TEXT_TOWERS = ("text.", "text_model.", "text_encoder.", "text_projection", "token_embedding.", "logit_")

# Names of Hugging Face's ViT, DeiT, DINOv2, CLIP and SigLIP towers, and timm's, in the order of the replacements.
_HUGGING_FACE = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),  # spelt so in CLIP
    (r"^(post_layernorm|layernorm)\.", "norm."),
    (r"^encoder\.layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.(attention\.attention|self_attn)\.(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.(attention\.output\.dense|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^visual_projection\.", "head."),
)
# Names of timm's ViT and of open_clip's.
_OPEN_CLIP = (
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^pos_embed$", "positional_embedding"),
    (r"^cls_token$", "class_embedding"),
    (r"^norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def strip_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Remove prefixes that all names share because a trainer wrapped the model, and those of compiled parts."""
    state = {name.replace(_COMPILED, ""): value for name, value in state.items()}
    prefix = next((prefix for prefix in _WRAPPERS if state and all(name.startswith(prefix) for name in state)), None)
    return strip_prefixes({name[len(prefix) :]: value for name, value in state.items()}) if prefix else state


def select_image_tower(state: Mapping[str, Tensor]) -> State:
    """Return the tensors of the image tower, without the prefixes of wrappers and towers."""
    state = strip_prefixes(state)
    for prefix in _IMAGE_TOWERS:
        tower = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if tower:
            kept = {name: state[name] for name in ("visual_projection.weight",) if name in state}
            return select_image_tower({**tower, **kept})
    return {name: value for name, value in state.items() if not name.startswith(_TEXT_TOWERS)}


def match_names(visual: nn.Module, state: State) -> State:
    """Rename an image tower's tensors to the names of ``visual``, which has a ``trunk`` if it is of timm.

    ``state`` comes from :func:`select_image_tower`. Names without a counterpart stay as they are.
    """
    if any(name.startswith("embeddings.patch_embedding") for name in state):
        state = _from_hugging_face(state)
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        inside = {name.removeprefix("trunk."): value for name, value in state.items() if name.startswith("trunk.")}
        outside = {name: value for name, value in state.items() if not name.startswith("trunk.")} if inside else {}
        return {f"trunk.{name}": value for name, value in _match_trunk(trunk, inside or state).items()} | outside
    return _to_open_clip(state) if "patch_embed.proj.weight" in state else state


def _match_trunk(trunk: nn.Module, state: State) -> State:
    """Apply timm's own conversion of other names and sizes, if names or shapes differ."""
    expected = trunk.state_dict()
    if all(name in state and state[name].shape == value.shape for name, value in expected.items()):
        return state
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    source = state
    if "class_embedding" in state:  # timm expects CLIP's names with the prefix
        source = {f"visual.{name}": value for name, value in state.items()}
    elif "patch_emb.0.block.conv.weight" in state:  # MobileCLIP-B
        source = {f"image_encoder.model.{name}": value for name, value in state.items()}
    converted = convert(dict(source), trunk)
    # timm resamples patches of another size, which makes another network of these weights.
    patches = "patch_embed.proj.weight"
    if patches in state and patches in expected and state[patches].shape[1:] != expected[patches].shape[1:]:
        converted[patches] = state[patches]
    return converted


def _from_hugging_face(state: State) -> State:
    """Rename tensors of a Hugging Face image tower to timm's names, with query, key and value in one tensor."""
    renamed = _rename(state, _HUGGING_FACE)
    renamed = {name: value for name, value in renamed.items() if not name.startswith(("pooler.", "embeddings."))}
    for name in [name for name in renamed if ".attn.q." in name]:
        names = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in names):
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed.pop(part) for part in names])
    for kind in ("weight", "bias"):
        if (fused := renamed.pop(f"attn_pool.qkv.{kind}", None)) is not None:
            width = fused.shape[0] // 3
            renamed |= {f"attn_pool.q.{kind}": fused[:width], f"attn_pool.kv.{kind}": fused[width:]}
    for name, ndim in (("pos_embed", 3), ("cls_token", 3)):
        while name in renamed and renamed[name].ndim < ndim:
            renamed[name] = renamed[name][None]
    return renamed


def _to_open_clip(state: State) -> State:
    """Rename tensors of timm's ViT to open_clip's names."""
    renamed = _rename(state, _OPEN_CLIP)
    if "positional_embedding" in renamed:
        renamed["positional_embedding"] = renamed["positional_embedding"].flatten(0, -2)
    if "class_embedding" in renamed:
        renamed["class_embedding"] = renamed["class_embedding"].flatten()
    if "head.weight" in renamed:
        renamed["proj"] = renamed.pop("head.weight").T.contiguous()
        renamed.pop("head.bias", None)
    return renamed


def _rename(state: State, replacements: tuple[tuple[str, str], ...]) -> State:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in replacements:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed
