"""Initial weights of a student, selected from a larger ViT.

The student takes the first blocks, and evenly spaced rows and columns of every matrix (Xu et al., "Initializing Models
with Larger Ones", ICLR 2024).
"""

import math
from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor

from student.config import StudentConfig
from student.model import Student
from teacher.weights import resize_positions
from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.errors import UserError

_NORM = "vit.transformer.norm.weight"
# Names in the blocks of open_clip, and in the blocks of the student.
_BLOCK_LAYERS = {
    "ln_1": "0.norm",
    "attn.out_proj": "0.to_out.0",
    "ln_2": "1.net.0",
    "mlp.c_fc": "1.net.1",
    "mlp.c_proj": "1.net.4",
}
_BLOCK_NAMES = {"attn.in_proj_weight": "0.to_qkv.weight"} | {
    f"{tower}.{kind}": f"{student}.{kind}" for tower, student in _BLOCK_LAYERS.items() for kind in ("weight", "bias")
}
# Weights of vit-pytorch's linear embeddings whose last axis is the pixels of a patch.
_PARTS, _NAMES = ("to_patch_embedding", "to_patch_tokens"), ("1.weight", "1.bias", "2.weight")
_PIXEL_WEIGHTS = tuple(f"{part}.{name}" for part in _PARTS for name in _NAMES)


def init_from_larger(student: Student, artifact: Artifact) -> int:
    """Initialise a student in place from a larger student, or from a teacher with a ViT of open_clip.

    A student of the same shape is copied. Returns the number of the student's parameters that were selected.

    Raises:
        UserError: Another kind of artifact or network, or a network that is narrower than the student.
    """
    path, kind = artifact.path, artifact.card.kind
    if kind not in ("student", "teacher"):
        raise UserError(f"start: {path} is a {kind} artifact. Use a student or a teacher.")
    with reraise_as_artifact_error(artifact):
        weights = load_file(artifact.file("model.safetensors"))
        if kind == "student":
            shape = StudentConfig(**artifact.card.config["model"])
            if shape.family != student.config.family:
                raise UserError(f"start: {path} has the family '{shape.family}'. Set model.family to it.")
            heads = shape.heads
        else:
            weights, vision = _rename_tower(weights, str(path)), artifact.card.config["tower_config"]["vision_cfg"]
            heads = int(vision.get("heads", 0)) or len(weights[_NORM]) // int(vision.get("head_width", 64))
        dim = len(weights[_NORM])
    if dim < student.config.dim:
        widths = f"has tokens of width {dim}, the student of {student.config.dim}"
        raise UserError(f"start: {path} {widths}. Use a model that is not narrower.")
    return select_weights(student, weights, heads)


def select_weights(student: Student, weights: Mapping[str, Tensor], heads: int) -> int:
    """Select a student's weights from a larger network in place and return the number of selected parameters.

    ``weights`` are under the student's names. Weights without a counterpart stay unchanged.
    """
    state, count = student.state_dict(), 0
    for name, value in state.items():
        source = weights.get(name)
        if source is None or source.ndim != value.ndim:
            continue
        # The pixels of patches of different sizes do not correspond.
        if name.endswith(_PIXEL_WEIGHTS) and source.shape[-1] != value.shape[-1]:
            continue
        selected = _select(name, source, value, heads, student.config.heads)
        if selected is not None:
            state[name] = selected
            count += value.numel()
    student.load_state_dict(state)
    return count


def _select(name: str, source: Tensor, value: Tensor, source_heads: int, heads: int) -> Tensor | None:
    """Select one weight of ``value``'s shape. Return None if the source is too small."""
    if name.endswith("pos_embedding"):
        return _select_positions(source, value)
    if name.endswith("to_qkv.weight"):
        return _select_heads(source, value.shape, source_heads, heads, 3)
    if name.endswith("to_out.0.weight"):
        transposed = _select_heads(source.T, value.shape[::-1], source_heads, heads, 1)
        return None if transposed is None else transposed.T
    return _select_evenly(source, value.shape)


def _select_evenly(source: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor | None:
    """Select evenly spaced entries along each axis. Return None if an axis is too short."""
    if any(length < target for length, target in zip(source.shape, shape, strict=True)):
        return None
    for axis, target in enumerate(shape):
        length = source.shape[axis]
        if length != target:
            source = source.index_select(axis, torch.arange(target) * length // target)
    return source


def _select_heads(
    source: Tensor, shape: torch.Size | tuple[int, ...], source_heads: int, heads: int, parts: int
) -> Tensor | None:
    """Select rows of (parts x heads x width, dim): evenly spaced heads, and evenly spaced rows of each head."""
    if source.shape[0] % (parts * source_heads) or shape[0] % (parts * heads):
        return None
    split = source.reshape(parts, source_heads, -1, source.shape[1])
    selected = _select_evenly(split, (parts, heads, shape[0] // (parts * heads), shape[1]))
    return None if selected is None else selected.reshape(-1, selected.shape[-1])


def _select_positions(source: Tensor, value: Tensor) -> Tensor | None:
    """Resize positions to the student's grid.

    A class token's position is dropped if the student has no class token. The student keeps its initial position of the
    class token if the source has none.
    """
    source_has_cls, has_cls = (math.isqrt(tokens.shape[-2]) ** 2 != tokens.shape[-2] for tokens in (source, value))
    if source_has_cls and not has_cls:
        source = source[..., 1:, :]
    grid = value[..., 1:, :] if has_cls and not source_has_cls else value
    resized = resize_positions(source, torch.Size((*grid.shape[:-1], source.shape[-1])))
    selected = _select_evenly(resized, grid.shape)
    if selected is None or grid is value:
        return selected
    return torch.cat([value[..., :1, :], selected], dim=-2)


def _rename_tower(weights: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return an open_clip ViT's weights under the names of a vit-pytorch student.

    vit-pytorch has no biases of queries, keys and values. The values' bias is added to the output's bias, which gives
    the same result because attention weights sum to 1. The keys' bias has no effect. The queries' bias is lost.
    """
    tower = {name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")}
    if "transformer.resblocks.0.attn.in_proj_weight" not in tower:
        raise UserError(f"start: the tower of {path} is not a ViT of open_clip. Use such a teacher, or a student.")
    width = tower["ln_post.weight"].shape[0]
    renamed = {
        _NORM: tower["ln_post.weight"],
        "vit.transformer.norm.bias": tower["ln_post.bias"],
        "vit.pos_embedding": tower["positional_embedding"],
        "vit.cls_token": tower["class_embedding"][None],
        # Patches are flattened as (row, column, channel).
        "vit.to_patch_embedding.2.weight": tower["conv1.weight"].permute(0, 2, 3, 1).reshape(width, -1),
        "vit.to_patch_embedding.3.weight": tower["ln_pre.weight"],
        "vit.to_patch_embedding.3.bias": tower["ln_pre.bias"],
    }
    if "proj" in tower:
        renamed["vit.mlp_head.weight"] = tower["proj"].T
    for name, value in tower.items():
        if name.startswith("transformer.resblocks."):
            block, _, part = name.removeprefix("transformer.resblocks.").partition(".")
            if part in _BLOCK_NAMES:
                renamed[f"vit.transformer.layers.{block}.{_BLOCK_NAMES[part]}"] = value
    for name in [name for name in tower if name.endswith("attn.in_proj_bias")]:
        prefix = name.removesuffix("in_proj_bias")
        output = f"vit.transformer.layers.{prefix.split('.')[2]}.0.to_out.0.bias"
        renamed[output] = renamed[output] + tower[f"{prefix}out_proj.weight"] @ tower[name][2 * width :]
    return renamed
