"""Changes to an image tower of open_clip: image size, overlapping patches, no projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vpr.common.errors import UserError


def input_size(visual: Any) -> int:
    """Side of the tower's images, pixels."""
    size = visual.image_size
    return int(size if isinstance(size, int) else size[0])


def set_size(visual: Any, size: int) -> None:
    """Make a timm tower take images of another size (open_clip's own towers are created with it)."""
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and hasattr(trunk, "set_input_size"):
        trunk.set_input_size((size, size))


def drop_projection(visual: Any, name: str) -> int:
    """Take CLIP's projection off a tower.

    Returns:
        the width of what it puts out then.

    Raises:
        UserError: the tower ends without a linear projection.
    """
    if getattr(visual, "proj", None) is not None:
        width = int(visual.proj.shape[0])
        visual.proj = None
        return width
    head = getattr(visual, "head", None)
    parts = {name for name, _ in head.named_children()} if isinstance(head, nn.Sequential) else set()
    # An attention pool of open_clip's own projects too, and cannot go.
    if parts & {"proj", "mlp"} and "pool" not in parts:
        visual.head = nn.Sequential()
        return int(visual.trunk.num_features)
    raise UserError(f"tower.keep_projection: {name} has no projection to drop: set it to true")


def overlap_patches(visual: Any, stride: int, name: str) -> None:
    """Move a ViT's patches closer together, so that there are more of them; positions become those of the new grid.

    Raises:
        UserError: no ViT, or a stride larger than its patch.
    """
    trunk = getattr(visual, "trunk", None)
    embed = getattr(trunk, "patch_embed", None)
    conv = getattr(embed, "proj", None) if trunk is not None else getattr(visual, "conv1", None)
    holder, key = (trunk, "pos_embed") if trunk is not None else (visual, "positional_embedding")
    if not isinstance(conv, nn.Conv2d) or getattr(holder, key, None) is None:
        raise UserError(f"tower.patch_stride: {name} is no ViT with position embeddings: set it to 0")
    patch = conv.kernel_size[0]
    if stride > patch:
        raise UserError(f"tower.patch_stride: {stride} is more than the patch of {patch} pixels: give less")
    across, old = (input_size(visual) - patch) // stride + 1, getattr(holder, key)
    before = embed.grid_size if embed is not None else visual.grid_size
    prefix = old.shape[-2] - before[0] * before[1]
    conv.stride = (stride, stride)
    shape = (*old.shape[:-2], prefix + across * across, old.shape[-1])
    setattr(holder, key, nn.Parameter(torch.randn(shape, device=old.device) * old.shape[-1] ** -0.5))
    grid = (across, across)
    if embed is not None:
        embed.grid_size, embed.num_patches = grid, across * across
        rope = getattr(trunk, "rope", None)
        if rope is not None:
            rope.update_feat_shape(list(grid))
    else:
        visual.grid_size = grid
