"""Where a student begins: weights selected from a larger ViT.

Its first blocks, and of every matrix evenly spaced rows and columns (Xu et al., "Initializing Models with Larger
Ones", ICLR 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from student.config import StudentConfig
from student.model import Student
from teacher.weights import resize_positions
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError

_NORM = "vit.transformer.norm.weight"
# Of open_clip's blocks, as they are called in ours.
_BLOCK = {
    "ln_1.weight": "0.norm.weight",
    "ln_1.bias": "0.norm.bias",
    "attn.in_proj_weight": "0.to_qkv.weight",
    "attn.out_proj.weight": "0.to_out.0.weight",
    "attn.out_proj.bias": "0.to_out.0.bias",
    "ln_2.weight": "1.net.0.weight",
    "ln_2.bias": "1.net.0.bias",
    "mlp.c_fc.weight": "1.net.1.weight",
    "mlp.c_fc.bias": "1.net.1.bias",
    "mlp.c_proj.weight": "1.net.4.weight",
    "mlp.c_proj.bias": "1.net.4.bias",
}


# Weights with an axis of a patch's pixels, of vit-pytorch's linear embeddings.
_OF_PIXELS = tuple(
    f"{part}.{name}"
    for part in ("to_patch_embedding", "to_patch_tokens")
    for name in ("1.weight", "1.bias", "2.weight")
)


def init_from_larger(student: Student, path: Path | str) -> tuple[Artifact, int]:
    """Start a student from a larger one, or from a teacher whose tower is a ViT of open_clip.

    A student of the same shape is taken over whole.

    Args:
        student: changed in place.
        path: student or teacher artifact.

    Returns:
        the artifact, and how many of the student's parameters were taken over.

    Raises:
        UserError: a tower of another kind, or one that is smaller than the student.
    """
    artifact = load_artifact(path)
    if artifact.card.kind not in ("student", "teacher"):
        raise UserError(f"start: {path} is a {artifact.card.kind}: give a student or a teacher")
    with reraise_as_artifact_error(artifact):
        weights = load_file(artifact.file("model.safetensors"))
        if artifact.card.kind == "student":
            shape = StudentConfig(**artifact.card.config["model"])
            if shape.family != student.config.family:
                raise UserError(f"start: {path} is of the family '{shape.family}': set model.family to it")
            heads = shape.heads
        else:
            weights, vision = _as_student(weights, str(path)), artifact.card.config["tower_config"]["vision_cfg"]
            heads = int(vision.get("heads", 0)) or len(weights[_NORM]) // int(vision.get("head_width", 64))
        width = len(weights[_NORM])
    if width < (own := student.config.dim):
        raise UserError(f"start: {path} has tokens of {width}, the student of {own}: give one that is at least as wide")
    return artifact, select_weights(student, weights, heads)


def select_weights(student: Student, weights: Mapping[str, Tensor], heads: int) -> int:
    """Select a student's weights from a larger network's; what has no counterpart stays as it is.

    Args:
        student: changed in place.
        weights: of the larger network, under the student's names.
        heads: of the larger network.

    Returns:
        how many parameters were selected.
    """
    own, taken = student.state_dict(), 0
    for name, value in own.items():
        source = weights.get(name)
        if source is None or source.ndim != value.ndim:
            continue
        # Pixels of a patch of another size lie elsewhere: there is nothing to select.
        if name.endswith(_OF_PIXELS) and source.shape[-1] != value.shape[-1]:
            continue
        found: Tensor | None
        if name.endswith("pos_embedding"):
            found = _positions(source, value)
        elif name.endswith("to_qkv.weight"):
            found = _select_qkv(source, value.shape, heads, student.config.heads)
        elif name.endswith("to_out.0.weight"):
            turned = _select_qkv(source.T, (value.shape[1], value.shape[0]), heads, student.config.heads, 1)
            found = None if turned is None else turned.T
        else:
            found = _evenly(source, value.shape)
        if found is not None:
            own[name] = found
            taken += value.numel()
    student.load_state_dict(own)
    return taken


def _evenly(source: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor | None:
    """Evenly spaced entries along each axis; None where it is too small."""
    if any(have < want for have, want in zip(source.shape, shape, strict=True)):
        return None
    for axis, want in enumerate(shape):
        have = source.shape[axis]
        if have != want:
            source = source.index_select(axis, torch.arange(want) * have // want)
    return source


def _select_qkv(
    source: Tensor, shape: torch.Size | tuple[int, ...], heads: int, own_heads: int, parts: int = 3
) -> Tensor | None:
    """Rows of (parts x heads x width, dim): evenly spaced heads and rows within each, so that neither ever mix."""
    if source.shape[0] % (parts * heads) or shape[0] % (parts * own_heads):
        return None
    split = source.reshape(parts, heads, -1, source.shape[1])
    found = _evenly(split, (parts, own_heads, shape[0] // (parts * own_heads), shape[1]))
    return None if found is None else found.reshape(-1, found.shape[-1])


def _positions(source: Tensor, value: Tensor) -> Tensor | None:
    """Positions of another grid, resized; a class token's is dropped, or the student's own kept, where one has none."""
    theirs, ours = (math.isqrt(one.shape[-2]) ** 2 != one.shape[-2] for one in (source, value))
    if theirs and not ours:
        source = source[..., 1:, :]
    grid = value[..., 1:, :] if ours and not theirs else value
    found = _evenly(resize_positions(source, torch.Size((*grid.shape[:-1], source.shape[-1]))), grid.shape)
    return found if found is None or grid is value else torch.cat([value[..., :1, :], found], dim=-2)


def _as_student(weights: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """An open_clip ViT's weights under a vit-pytorch student's names.

    vit-pytorch has no biases of queries, keys and values. That of the values is added to the output's, which
    gives the same result (attention weights sum to 1); that of the keys changes nothing; the queries' is lost.
    """
    tower = {name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")}
    if "transformer.resblocks.0.attn.in_proj_weight" not in tower:
        raise UserError(f"start: {path}: its tower is no ViT of open_clip: give one that is, or a larger student")
    width = tower["ln_post.weight"].shape[0]
    found = {
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
        found["vit.mlp_head.weight"] = tower["proj"].T
    for name, value in tower.items():
        if name.startswith("transformer.resblocks."):
            block, _, part = name.removeprefix("transformer.resblocks.").partition(".")
            if part in _BLOCK:
                found[f"vit.transformer.layers.{block}.{_BLOCK[part]}"] = value
    for name in [name for name in tower if name.endswith("attn.in_proj_bias")]:
        prefix = name.removesuffix("in_proj_bias")
        block = prefix.split(".")[2]
        output = f"vit.transformer.layers.{block}.0.to_out.0.bias"
        found[output] = found[output] + tower[f"{prefix}out_proj.weight"] @ tower[name][2 * width :]
    return found
