"""Weights of an image tower: reading, downloading and fitting to its names and image size."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from teacher.naming import match_names, select_image_tower
from vpr.common.errors import UserError, explain_system_error

_POSITIONS = ("positional_embedding", "pos_embed")
_PROJECTION = ("proj", "head.proj.", "head.mlp.")
# Classifiers, and buffers that other versions of a library save.
_CLASSIFIERS = ("head.", "head_dist.", "fc.", "classifier.", "aux_head.")
_BUFFERS = ("mask_token", "relative_position_index", "attn_mask", "position_ids", "num_batches_tracked")
_PYTORCH, _LFS_POINTER = (b"PK\x03\x04", b"\x80\x02"), b"version https://git-lfs"  # first bytes of a file
_SHOWN = 3  # names in a message


class MissingProjection(UserError):
    """Weights of the same tower without its projection."""


def read_tower_weights(path: Path) -> dict[str, Tensor]:
    """Return the image tower of a checkpoint or a teacher, without prefixes such as ``visual.`` and ``module.``.

    Raises:
        UserError: The file does not exist, is no safetensors file, or has no image tower.
    """
    if not path.exists():
        raise UserError(f"tower.pretrained: {path} does not exist. Check the path.")
    if path.suffix != ".safetensors":
        problem = f"{path} is no .safetensors file, and pickled weights can run code"
        raise UserError(f"tower.pretrained: {problem}. Convert it with vpr teacher convert.")
    if not path.is_file():
        raise UserError(f"tower.pretrained: {path} is not a file. Name a .safetensors file or a teacher.")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        problem, fix = _explain_other_file(path) or (f"is not a safetensors file ({error})", "Copy it again")
        raise UserError(f"tower.pretrained: {path} {problem}. {fix}.") from None
    tower = select_image_tower(state)
    if not tower:
        raise UserError(f"tower.pretrained: {path} has no tensor of an image tower. Use another checkpoint.")
    return tower


def _explain_other_file(path: Path) -> tuple[str, str] | None:
    """Return what a file with the name of weights is, and what to do; None if that is not known."""
    with path.open("rb") as stream:
        head = stream.read(len(_LFS_POINTER))
    if head.startswith(_PYTORCH):
        return "is a PyTorch checkpoint under another name", "Convert it with vpr teacher convert"
    if head == _LFS_POINTER:
        return "is a pointer of Git LFS and no weights", "Fetch the file with git lfs pull"
    return None


def download_open_clip(name: str, tag: dict[str, Any]) -> dict[str, Tensor]:
    """Return the image tower of an open_clip tag, from the hub or its cache; raise :class:`UserError` if that fails."""
    import open_clip

    try:
        file = open_clip.download_pretrained(tag, prefer_hf_hub=True) or f"{name} (the tag names no file)"
    except Exception as error:  # of the network and the hub
        raise _failed_download(f"open_clip/{name}", error) from None
    return read_tower_weights(Path(file))


def download_timm(model: str, tag: str) -> dict[str, Tensor]:
    """Return the weights of a timm tag, from the hub or its cache; raise :class:`UserError` if that fails."""
    import timm

    try:
        return timm.create_model(f"{model}.{tag}", pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of the network, the hub and the file
        raise _failed_download(f"timm/{model}.{tag}", error) from None


def _failed_download(name: str, error: Exception) -> Exception:
    """Return the :class:`UserError` of a failed download, or the error itself if the machine lacks memory or room."""
    if explain_system_error(error):
        return error
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    fix = "Check the network, or set tower.pretrained to a .safetensors file"
    return UserError(f"tower.pretrained: cannot load {name} ({reason}). {fix}.")


def load_tower_weights(visual: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights of any image size, stride and projection, named as by timm, open_clip or Hugging Face.

    Raises:
        MissingProjection: The weights are those of the tower, without its projection.
        UserError: The weights fit another tower.
    """
    try:
        state = match_names(visual, state)
    except Exception as error:  # a library's conversion raises many types on weights of another network
        if explain_system_error(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        problem = f"the weights are of another tower ({reason})"
        raise UserError(f"tower.pretrained: {problem}. Set tower.name to their tower.") from None
    expected = visual.state_dict()
    fitted = {}
    for name, value in state.items():
        if name not in expected:
            continue
        is_position = name.rsplit(".", 1)[-1] in _POSITIONS
        fitted[name] = resize_positions(value, expected[name].shape) if is_position else value
    unexpected = {name for name in state.keys() - expected.keys() if not _is_unused(visual, name)}
    missing = {name for name in expected.keys() - state.keys() if not name.endswith(_BUFFERS)}
    if missing and all(name.startswith(_PROJECTION) for name in missing):
        fix = "Set tower.keep_projection to false"
        raise MissingProjection(f"tower.pretrained: the weights lack the projection {_first_names(missing)}. {fix}.")
    reshaped = {name for name, value in fitted.items() if value.shape != expected[name].shape}
    for problem, names in (("lack", missing), ("have", unexpected), ("differ in the shape of", reshaped)):
        if names:
            fix = "Set tower.name to their tower"
            raise UserError(f"tower.pretrained: the weights {problem} {_first_names(names)}. {fix}.")
    _check_values({name: value for name, value in fitted.items() if expected[name].is_floating_point()})
    visual.load_state_dict(fitted, strict=False)


def _check_values(weights: dict[str, Tensor]) -> None:
    """Raise :class:`UserError` if weights that are numbers of a network are quantised or not finite."""
    if quantised := [name for name, value in weights.items() if not value.is_floating_point()]:
        problem = f"the weights have integers in {_first_names(quantised)}, which are quantised"
        raise UserError(f"tower.pretrained: {problem}. Use a checkpoint that is not quantised.")
    if broken := [name for name, value in weights.items() if not bool(value.float().isfinite().all())]:
        problem = f"the weights have values that are not finite in {_first_names(broken)}"
        raise UserError(f"tower.pretrained: {problem}. Use another checkpoint.")


def _is_unused(visual: nn.Module, name: str) -> bool:
    """Return whether a tower needs no tensor of this name: a classifier, CLIP's projection or a buffer."""
    if name.startswith(_PROJECTION) or name.endswith(_BUFFERS):
        return True
    trunk = getattr(visual, "trunk", None)
    classifier = getattr(trunk, "pretrained_cfg", {}).get("classifier") or ()
    classifiers = {
        f"{part.partition('.')[0]}." for part in ([classifier] if isinstance(classifier, str) else classifier)
    }
    return name.removeprefix("trunk.").startswith((*_CLASSIFIERS, *classifiers))


def _first_names(names: Collection[str]) -> str:
    first = ", ".join(f"'{name}'" for name in sorted(names)[:_SHOWN])
    return f"{first} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else first


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
    if side * side != new - prefix or math.isqrt(old - prefix) ** 2 != old - prefix:
        return positions  # of a grid that is no square
    resized = resample_abs_pos_embed(positions.reshape(1, old, -1), [side, side], num_prefix_tokens=prefix)
    return resized.reshape(shape).contiguous()
