"""Weights of an image tower: read from where they are kept, and fitted to its image size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vpr.common.errors import UserError

_POSITIONS = ("positional_embedding", "pos_embed")


def read_tower_weights(path: Path) -> dict[str, Tensor]:
    """The image tower's part of a CLIP checkpoint, without its prefix ``visual.``; the text tower is not kept.

    Args:
        path: ``.safetensors`` of open_clip, or of a teacher.

    Raises:
        UserError: no such file, another form, or no image tower inside.
    """
    if not path.exists():
        raise UserError(f"tower.pretrained: {path}: no such file: check the path")
    if path.suffix != ".safetensors":
        raise UserError(
            f"tower.pretrained: {path}: pickled weights can run code: convert them to .safetensors (tensors named as "
            "in open_clip) and give that file"
        )
    if not path.is_file():
        raise UserError(f"tower.pretrained: {path}: is no file: name a .safetensors file or a teacher")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"tower.pretrained: {path}: no safetensors file ({error}): check or copy it again") from None
    visual = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    if not visual:
        raise UserError(f"tower.pretrained: {path}: no tensor named 'visual.…': give a checkpoint of open_clip's form")
    return visual


def download(name: str, tag: dict[str, Any]) -> Path:
    """The safetensors file of an open_clip tag, from the hub or its cache."""
    import open_clip

    return Path(open_clip.download_pretrained(tag, prefer_hf_hub=True) or f"{name} (the tag names no file)")


def load_tower_weights(visual: nn.Module, state: dict[str, Tensor]) -> None:
    """Load an image tower's weights, resizing its position embeddings to the tower's own grid.

    Args:
        visual: the tower; a projection that it has dropped may be in ``state``.
        state: weights of the same kind of tower, of any image size or patch stride.

    Raises:
        UserError: weights of another tower.
    """
    own = visual.state_dict()
    fitted = {}
    for name, value in state.items():
        if name not in own:
            continue
        position = name.rsplit(".", 1)[-1] in _POSITIONS
        fitted[name] = resize_positions(value, own[name].shape) if position else value
    strange = sorted(state.keys() - own.keys() - _droppable(state))
    missing = sorted(own.keys() - state.keys())
    other = sorted(name for name, value in fitted.items() if value.shape != own[name].shape)
    for what, names in (("lack", missing), ("have", strange), ("differ in the shape of", other)):
        if names:
            raise UserError(f"tower.pretrained: the weights {what} '{names[0]}': they are of another tower than named")
    visual.load_state_dict(fitted)


def resize_positions(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Position embeddings of a square grid, resized bicubically (antialiased) to another; a class token stays.

    Args:
        positions: (tokens, width) or (1, tokens, width).
        shape: of the result; the same number of axes.
    """
    from timm.layers import resample_abs_pos_embed

    if positions.shape == tuple(shape) or positions.ndim != len(shape) or positions.shape[-1] != shape[-1]:
        return positions
    old, new = positions.shape[-2], shape[-2]
    prefix = 0 if math.isqrt(old) ** 2 == old else 1
    side = math.isqrt(new - prefix)
    if side * side != new - prefix:
        return positions
    resized = resample_abs_pos_embed(positions.reshape(1, old, -1), [side, side], num_prefix_tokens=prefix)
    return resized.reshape(shape).contiguous()


def _droppable(state: dict[str, Tensor]) -> set[str]:
    """CLIP's projection, which a tower may be used without."""
    return {name for name in state if name == "proj" or name.startswith(("head.proj.", "head.mlp."))}
