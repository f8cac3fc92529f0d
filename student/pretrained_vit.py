"""Reading of ViTs of timm and open_clip: their shape and their weights under the names of a student."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student.config import StudentConfig

State = dict[str, Tensor]

_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu-tanh", "QuickGELU": "quick-gelu"}
_BLOCKS = "vit.transformer.layers"


class UnsupportedVit(ValueError):
    """A tower that no student computes; the message continues the name of the tower."""


@dataclass(frozen=True)
class VitBlock:
    """Layers of a block; a scale is None without LayerScale. ``qkv`` are the weight and, if there is one, the bias."""

    norm1: nn.LayerNorm
    qkv: tuple[Tensor, Tensor | None]
    out: nn.Linear
    scale1: Tensor | None
    norm2: nn.LayerNorm
    fc1: nn.Linear
    activation: nn.Module
    fc2: nn.Linear
    scale2: Tensor | None


@dataclass(frozen=True)
class Vit:
    """Parts of a ViT of any library.

    ``prefix`` are the (tokens, dim) class and register tokens, the class token first. ``prefix_positions`` are theirs,
    and ``positions`` the (grid², dim) of the patches. ``head`` are weight and bias of a linear after the pooling.
    """

    patches: nn.Conv2d
    prefix: Tensor
    prefix_positions: Tensor
    positions: Tensor
    pre_norm: nn.LayerNorm | None
    blocks: list[VitBlock]
    heads: int
    norm: nn.LayerNorm
    pool: str
    norms_pooled: bool
    map_pool: Any
    head: tuple[Tensor, Tensor | None] | None


def read_vit(visual: Any) -> Vit:
    """Return the parts of a teacher's image tower.

    Raises:
        UnsupportedVit: The tower is no ViT of timm or open_clip, or has layers that a student lacks.
    """
    from open_clip.transformer import VisionTransformer as OpenClipVit
    from timm.models.vision_transformer import VisionTransformer as TimmVit

    trunk = getattr(visual, "trunk", None)
    if type(trunk) is TimmVit:
        return _read_timm(trunk, _read_head(visual.head))
    if type(visual) is OpenClipVit:
        return _read_open_clip(visual)
    raise UnsupportedVit(
        f"is a {type(visual if trunk is None else trunk).__name__}, not a plain ViT of timm or open_clip"
    )


def vit_shape(vit: Vit) -> StudentConfig:
    """Return the shape of the student that computes the same features; its ``embedding_dim`` is 0.

    Raises:
        UnsupportedVit: No student has this shape.
    """
    block, patch, side = vit.blocks[0], vit.patches.kernel_size[0], math.isqrt(len(vit.positions))
    dim, has_class = vit.patches.out_channels, vit.pool == "cls"
    _require(_is_uniform(vit), "has blocks of different layers, or norms of different epsilon")
    _require(side * side == len(vit.positions), "has no square grid of positions")
    _require(vit.heads > 1, "has one attention head, where vit-pytorch has no projection of the output")
    name = type(block.activation).__name__
    if name not in _ACTIVATIONS:
        raise UnsupportedVit(f"has the activation {name}, which a student does not support")
    is_tanh = getattr(block.activation, "approximate", "none") == "tanh"
    return StudentConfig(
        preset="auto",
        image_size=side * patch,
        patch_size=patch,
        dim=dim,
        depth=len(vit.blocks),
        heads=vit.heads,
        dim_head=block.out.in_features // vit.heads,
        mlp_dim=block.fc1.out_features,
        pool=vit.pool,  # type: ignore[arg-type]
        registers=len(vit.prefix) - has_class,
        qkv_bias=block.qkv[1] is not None,
        layer_scale=block.scale1 is not None,
        patch_norms=False,
        pre_norm=vit.pre_norm is not None,
        pooled_norm=vit.norms_pooled,
        activation="gelu-tanh" if is_tanh else _ACTIVATIONS[name],  # type: ignore[arg-type]
        norm_eps=vit.norm.eps,
    )


def vit_weights(vit: Vit) -> State:
    """Return the weights under a student's names. Tokens other than the class token become registers.

    Positions of registers are added to them. A class token without a position gets one of zeros, and a linear without
    a bias a bias of zeros. The query of a map pooling is projected.
    """
    dim, has_class = vit.patches.out_channels, vit.pool == "cls"
    # Patches are flattened as (row, column, channel).
    state = _pair("vit.to_patch_embedding.2", vit.patches.weight.permute(0, 2, 3, 1).reshape(dim, -1), vit.patches.bias)
    positions, registers = vit.positions, vit.prefix + vit.prefix_positions
    if has_class:
        state["vit.cls_token"] = vit.prefix[:1]
        positions, registers = torch.cat([vit.prefix_positions[:1], positions]), registers[1:]
    state["vit.pos_embedding"] = positions
    if len(registers):
        state["vit.transformer.registers"] = registers
    if vit.pre_norm is not None:
        state |= _module("vit.transformer.pre_norm", vit.pre_norm)
    state |= _module("vit.to_latent" if vit.norms_pooled else "vit.transformer.norm", vit.norm)
    for number, block in enumerate(vit.blocks):
        state |= _block_weights(f"{_BLOCKS}.{number}", block)
    if vit.map_pool is not None:
        state |= _map_pool_weights("vit.transformer.pool", vit.map_pool)
    if vit.head is not None:
        state |= _pair("vit.mlp_head", *vit.head)
    return {name: value.detach() for name, value in state.items()}


def _block_weights(prefix: str, block: VitBlock) -> State:
    state = _pair(f"{prefix}.0.to_qkv", *block.qkv) if block.qkv[1] is not None else {}
    state |= {f"{prefix}.0.to_qkv.weight": block.qkv[0]}
    state |= _module(f"{prefix}.0.norm", block.norm1) | _module(f"{prefix}.0.to_out.0", block.out)
    state |= _module(f"{prefix}.1.net.0", block.norm2)
    state |= _module(f"{prefix}.1.net.1", block.fc1) | _module(f"{prefix}.1.net.4", block.fc2)
    if block.scale1 is not None and block.scale2 is not None:
        state |= {f"{prefix}.0.to_out.2.gamma": block.scale1, f"{prefix}.1.net.6.gamma": block.scale2}
    return state


def _map_pool_weights(prefix: str, pool: Any) -> State:
    state = {f"{prefix}.query": pool.q(pool.latent).flatten()}
    state |= _module(f"{prefix}.to_kv", pool.kv) | _module(f"{prefix}.to_out", pool.proj)
    state |= _module(f"{prefix}.mlp.net.0", pool.norm)
    return state | _module(f"{prefix}.mlp.net.1", pool.mlp.fc1) | _module(f"{prefix}.mlp.net.4", pool.mlp.fc2)


def _module(name: str, module: Any) -> State:
    return _pair(name, module.weight, module.bias)


def _pair(name: str, weight: Tensor, bias: Tensor | None) -> State:
    return {f"{name}.weight": weight, f"{name}.bias": weight.new_zeros(len(weight)) if bias is None else bias}


def _read_timm(vit: Any, head: tuple[Tensor, Tensor | None] | None) -> Vit:
    from timm.layers import PatchEmbed

    is_known = type(vit.patch_embed) is PatchEmbed and isinstance(vit.patch_embed.norm, nn.Identity)
    _require(is_known and vit.pos_embed is not None, "has another patch embedding, or no learned positions")
    pool = {"token": "cls", "avg": "mean", "map": "map"}.get(vit.global_pool, "")
    _require(bool(pool), f"has the pooling '{vit.global_pool}'")
    _require(not vit.pool_include_prefix, "pools its class or register tokens with the others")
    _require(vit.attn_pool is None or _is_plain_pool(vit.attn_pool), "has another map pooling")
    norms_pooled = isinstance(vit.fc_norm, nn.LayerNorm)
    norm = vit.fc_norm if norms_pooled else vit.norm
    _require(isinstance(norm, nn.LayerNorm), "has no norm after its blocks")
    prefix = [token[0] for token in (vit.cls_token, vit.reg_token) if token is not None]
    tokens = torch.cat(prefix) if prefix else vit.pos_embed.new_zeros(0, vit.embed_dim)
    positions = vit.pos_embed[0]
    own = torch.zeros_like(tokens) if vit.no_embed_class else positions[: len(tokens)]
    grid = positions if vit.no_embed_class else positions[len(tokens) :]
    pre_norm = vit.norm_pre if isinstance(vit.norm_pre, nn.LayerNorm) else None
    blocks = [_read_timm_block(block) for block in vit.blocks]
    _require(vit.patch_embed.proj.stride == vit.patch_embed.proj.kernel_size, "has overlapping patches")
    heads = vit.blocks[0].attn.num_heads
    parts = (vit.patch_embed.proj, tokens, own, grid, pre_norm, blocks, heads, norm, pool, norms_pooled)
    return Vit(*parts, vit.attn_pool if pool == "map" else None, head)


def _read_timm_block(block: Any) -> VitBlock:
    from timm.layers import Attention, Mlp
    from timm.models.vision_transformer import Block

    is_plain = type(block) is Block and type(block.attn) is Attention and type(block.mlp) is Mlp
    names = ("q_norm", "k_norm", "norm") if is_plain else ()
    norms = [getattr(block.attn, name, None) for name in names] + ([block.mlp.norm] if is_plain else [])
    # Softmax attention over scaled products, with no norm inside a layer.
    _require(is_plain and all(isinstance(norm, nn.Identity | None) for norm in norms), "has blocks of another kind")
    scales = [getattr(scale, "gamma", None) for scale in (block.ls1, block.ls2)]
    attention, mlp = block.attn, block.mlp
    qkv = (attention.qkv.weight, attention.qkv.bias)
    first = (block.norm1, qkv, attention.proj, scales[0])
    return VitBlock(*first, block.norm2, mlp.fc1, mlp.act, mlp.fc2, scales[1])


def _read_open_clip(vit: Any) -> Vit:
    _require(vit.attn_pool is None and vit.pool_type in ("tok", "avg"), "has attention pooling")
    conv = vit.conv1
    _require(conv.stride == conv.kernel_size, "has overlapping patches")
    pool = "cls" if vit.pool_type == "tok" else "mean"
    blocks = [_read_open_clip_block(block) for block in vit.transformer.resblocks]
    positions = vit.positional_embedding
    pre_norm = vit.ln_pre if isinstance(vit.ln_pre, nn.LayerNorm) else None
    heads = vit.transformer.resblocks[0].attn.num_heads
    head = None if vit.proj is None else (vit.proj.T, None)
    first = (conv, vit.class_embedding[None], positions[:1], positions[1:], pre_norm, blocks, heads, vit.ln_post)
    return Vit(*first, pool, bool(vit.final_ln_after_pool) and pool == "mean", None, head)


def _read_open_clip_block(block: Any) -> VitBlock:
    from open_clip.transformer import ResidualAttentionBlock

    is_plain = type(block) is ResidualAttentionBlock and type(block.attn) is nn.MultiheadAttention
    _require(is_plain, "has blocks of another kind")
    scales = [getattr(scale, "gamma", None) for scale in (block.ls_1, block.ls_2)]
    attention, mlp = block.attn, block.mlp
    qkv = (attention.in_proj_weight, attention.in_proj_bias)
    first = (block.ln_1, qkv, attention.out_proj, scales[0])
    return VitBlock(*first, block.ln_2, mlp.c_fc, mlp.gelu, mlp.c_proj, scales[1])


def _read_head(head: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return the linear after a trunk of timm, or None without one."""
    layers = [layer for layer in head.modules() if next(layer.children(), None) is None]
    layers = [layer for layer in layers if not isinstance(layer, nn.Identity | nn.Dropout | nn.Sequential)]
    if not layers:
        return None
    _require(len(layers) == 1 and isinstance(layers[0], nn.Linear), "has a projection of several layers")
    return layers[0].weight, layers[0].bias


def _is_plain_pool(pool: Any) -> bool:
    from timm.layers import AttentionPoolLatent

    is_known = type(pool) is AttentionPoolLatent
    is_plain = is_known and pool.pos_embed is None and pool.latent_len == 1 and pool.mlp is not None
    return is_plain and all(isinstance(norm, nn.Identity) for norm in (pool.q_norm, pool.k_norm))


def _is_uniform(vit: Vit) -> bool:
    """Return whether all blocks have the same layers and all norms the same epsilon."""
    kinds = {
        (type(block.activation), block.qkv[1] is None, block.scale1 is None, block.scale2 is None)
        for block in vit.blocks
    }
    norms = [vit.norm, *(norm for block in vit.blocks for norm in (block.norm1, block.norm2))]
    norms += [vit.pre_norm] if vit.pre_norm is not None else []
    norms += [vit.map_pool.norm] if vit.map_pool is not None else []
    epsilons = {norm.eps if isinstance(norm, nn.LayerNorm) else None for norm in norms}
    return len(kinds) == 1 and len(epsilons) == 1 and None not in epsilons


def _require(is_met: bool, problem: str) -> None:
    if not is_met:
        raise UnsupportedVit(problem)
