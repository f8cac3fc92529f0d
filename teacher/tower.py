"""Changes to an open_clip image tower: image size, overlapping patches, no projection."""

from typing import Any

import torch
from torch import nn

from vpr.common.errors import UserError


def input_size(visual: Any) -> int:
    """Return the side of the tower's images in pixels."""
    size = visual.image_size
    return int(size if isinstance(size, int) else size[0])


def set_size(visual: Any, size: int) -> None:
    """Set the image size of a timm tower; open_clip creates its own towers with the size."""
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and hasattr(trunk, "set_input_size"):
        trunk.set_input_size((size, size))


def drop_projection(visual: Any, name: str) -> int:
    """Remove CLIP's projection and return the tower's width without it; raise :class:`UserError` if it has none."""
    if getattr(visual, "proj", None) is not None:
        width = int(visual.proj.shape[0])
        visual.proj = None
        return width
    head = getattr(visual, "head", None)
    parts = {name for name, _ in head.named_children()} if isinstance(head, nn.Sequential) else set()
    # open_clip's attention pool contains its projection, so it cannot be removed.
    if parts & {"proj", "mlp"} and "pool" not in parts:
        visual.head = nn.Sequential()
        return int(visual.trunk.num_features)
    raise UserError(f"tower.keep_projection: {name} has no projection to remove. Set it to true.")


def unread_pixels(visual: Any) -> int:
    """Return how many rows at the bottom, and columns on the right, of an image are in no patch of a ViT."""
    conv = _patch_embedding(visual)
    return 0 if conv is None else (input_size(visual) - conv.kernel_size[0]) % conv.stride[0]


def _patch_embedding(visual: Any) -> nn.Conv2d | None:
    """Return the patch embedding of a ViT with position embeddings; None for other networks."""
    trunk = getattr(visual, "trunk", None)
    conv = getattr(getattr(trunk, "patch_embed", None), "proj", None)
    positions = getattr(trunk, "pos_embed", None)
    if trunk is None:
        conv, positions = getattr(visual, "conv1", None), getattr(visual, "positional_embedding", None)
    return conv if isinstance(conv, nn.Conv2d) and positions is not None else None


def overlap_patches(visual: Any, stride: int, name: str) -> None:
    """Lower the stride of a ViT's patches and draw position embeddings for the larger grid.

    Raises:
        UserError: The tower is no ViT, or the stride is larger than its patch.
    """
    trunk, conv = getattr(visual, "trunk", None), _patch_embedding(visual)
    embed = getattr(trunk, "patch_embed", None)
    holder, key = (trunk, "pos_embed") if trunk is not None else (visual, "positional_embedding")
    if conv is None:
        raise UserError(f"tower.patch_stride: {name} is no ViT with position embeddings. Set it to 0.")
    patch = conv.kernel_size[0]
    if stride > patch:
        raise UserError(f"tower.patch_stride: expected at most {patch} (the side of a patch), got {stride}.")
    side, positions = (input_size(visual) - patch) // stride + 1, getattr(holder, key)
    old_grid = embed.grid_size if embed is not None else visual.grid_size
    prefix = positions.shape[-2] - old_grid[0] * old_grid[1]
    conv.stride = (stride, stride)
    shape = (*positions.shape[:-2], prefix + side * side, positions.shape[-1])
    setattr(holder, key, nn.Parameter(torch.randn(shape, device=positions.device) * positions.shape[-1] ** -0.5))
    if embed is None:
        visual.grid_size = (side, side)
        return
    embed.grid_size, embed.num_patches = (side, side), side * side
    if (rope := getattr(trunk, "rope", None)) is not None:
        rope.update_feat_shape([side, side])
