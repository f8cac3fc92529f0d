"""Weights of an image tower: reading, downloading and fitting to its image size."""

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vpr.common.errors import UserError

_POSITIONS = ("positional_embedding", "pos_embed")


def read_tower_weights(path: Path) -> dict[str, Tensor]:
    """Return the image tower of a CLIP checkpoint of open_clip, or of a teacher, names without ``visual.``.

    Raises:
        UserError: The file does not exist, is no safetensors file, or has no image tower.
    """
    if not path.exists():
        raise UserError(f"tower.pretrained: {path} does not exist. Check the path.")
    if path.suffix != ".safetensors":
        problem = f"{path} is no .safetensors file, and pickled weights can run code"
        raise UserError(f"tower.pretrained: {problem}. Convert it to .safetensors with open_clip's tensor names.")
    if not path.is_file():
        raise UserError(f"tower.pretrained: {path} is not a file. Name a .safetensors file or a teacher.")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"tower.pretrained: {path} is not a safetensors file ({error}). Copy it again.") from None
    visual = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    if not visual:
        raise UserError(f"tower.pretrained: {path} has no tensor 'visual.*'. Use a checkpoint in open_clip's form.")
    return visual


def download(name: str, tag: dict[str, Any]) -> Path:
    """Return the safetensors file of an open_clip tag, from the hub or its cache."""
    import open_clip

    return Path(open_clip.download_pretrained(tag, prefer_hf_hub=True) or f"{name} (the tag names no file)")


def load_tower_weights(visual: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights of any image size, stride and projection; raise :class:`UserError` if they fit another tower."""
    expected = visual.state_dict()
    fitted = {}
    for name, value in state.items():
        if name not in expected:
            continue
        is_position = name.rsplit(".", 1)[-1] in _POSITIONS
        fitted[name] = resize_positions(value, expected[name].shape) if is_position else value
    # A tower may lack CLIP's projection.
    projection = {name for name in state if name == "proj" or name.startswith(("head.proj.", "head.mlp."))}
    unexpected = sorted(state.keys() - expected.keys() - projection)
    missing = sorted(expected.keys() - state.keys())
    reshaped = sorted(name for name, value in fitted.items() if value.shape != expected[name].shape)
    for problem, names in (("lack", missing), ("have", unexpected), ("differ in the shape of", reshaped)):
        if names:
            raise UserError(f"tower.pretrained: the weights {problem} '{names[0]}'. Set tower.name to their tower.")
    visual.load_state_dict(fitted)


def resize_positions(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resize position embeddings between square grids, bicubic with antialiasing; a class token is copied.

    They are (tokens, width) or (1, tokens, width), as is the ``shape`` of the result.
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
