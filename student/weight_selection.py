"""Initial weights of a student, selected from a larger ViT.

The student takes the first blocks, and evenly spaced rows and columns of every matrix (Xu et al., "Initializing Models
with Larger Ones", ICLR 2024). A student of the same shape takes all weights.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from student.config import SIZES
from student.model import Student
from student.start import Start
from teacher.weights import resize_positions
from vpr.common.errors import UserError

_HEAD = "vit.mlp_head."
# Weights of vit-pytorch's linear embeddings whose last axis is the pixels of a patch.
_PARTS, _NAMES = ("to_patch_embedding", "to_patch_tokens"), ("1.weight", "1.bias", "2.weight")
_PIXEL_WEIGHTS = tuple(f"{part}.{name}" for part in _PARTS for name in _NAMES)
# Tensors with rows of heads, and how many times they have all heads: queries, keys and values, or some of them.
_HEAD_ROWS = {"to_qkv.weight": 3, "to_qkv.bias": 3, "pool.to_kv.weight": 2, "pool.to_kv.bias": 2, "pool.query": 1}
_HEAD_COLUMNS = ("0.to_out.0.weight", "pool.to_out.weight")
# Rounding of another order of operations; a network that computes something else differs by far more.
_TOLERANCE, _SHOWN = 1e-3, 3


def init_from_start(student: Student, start: Start) -> tuple[int, float | None]:
    """Initialise a student in place.

    The head of a tower is new, except that a student of its width and embedding begins with the features themselves.

    Returns:
        Number of the student's parameters that were selected, and the largest absolute difference of its features to
        those of the start on random pixels. The difference is None for a smaller student or a student artifact.

    Raises:
        UserError: The start lacks the weights of a layer, has weights that are not finite, or computes other features
            than a student of its shape.
    """
    names = _select(student, start.weights, start.shape.heads)
    state, config = student.state_dict(), student.config
    _check_finite(names, state, start)
    if start.reference is not None:
        _check_complete(names, student, start)
        if f"{_HEAD}weight" not in start.weights and config.embedding_dim == config.dim == start.shape.dim:
            with torch.no_grad():
                student.vit.mlp_head.weight.copy_(torch.eye(config.dim))
                student.vit.mlp_head.bias.zero_()
    if start.kind == "network":
        _silence_blocks(student)
    count = sum(state[name].numel() for name in names)
    is_whole = all(getattr(config, key) == getattr(start.shape, key) for key in (*SIZES, "pool", "registers"))
    return count, _compare_features(student, start) if start.reference is not None and is_whole else None


def _check_finite(names: set[str], state: Mapping[str, Tensor], start: Start) -> None:
    """Raise :class:`UserError` if a selected weight is not finite. A smaller student has no features to compare."""
    for name in sorted(names):
        if not bool(torch.isfinite(state[name]).all()):
            raise UserError(f"start: {start.name} has weights that are not finite, in '{name}'. Use other weights.")


def _silence_blocks(student: Student) -> None:
    """Make new blocks return their input at first, so that they do not disturb the features of a pretrained stem.

    Their last layers begin at 0 (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1), and the positions.
    """
    with torch.no_grad():
        for attention, mlp in student.vit.transformer.layers:
            for module in (attention.to_out, mlp):
                last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
                last.weight.zero_()
                last.bias.zero_()
        student.vit.pos_embedding.zero_()


def _check_complete(names: set[str], student: Student, start: Start) -> None:
    """Raise :class:`UserError` if a layer of the student got no weights, though the start has the layer."""
    config, state = student.config, student.state_dict()
    new: tuple[str, ...] = (_HEAD,)
    if config.registers > start.shape.registers:
        new += ("vit.transformer.registers",)
    if config.pool != start.shape.pool:
        new += ("vit.cls_token", "vit.transformer.pool.")
    without = [name for name in state if name not in names and not name.startswith(new) and state[name].numel()]
    if without:
        shown = ", ".join(f"'{name}'" for name in without[:_SHOWN])
        more = f" and {len(without) - _SHOWN} more" if len(without) > _SHOWN else ""
        raise UserError(f"start: {start.name} has no weights that fit {shown}{more}. Use another model.")


def _compare_features(student: Student, start: Start) -> float:
    assert start.reference is not None
    size = student.config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    found: list[Tensor] = []
    handle = student.vit.to_latent.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    was_training = student.training
    with torch.no_grad():
        student.eval()(pixels)
        expected = start.reference(pixels)
    handle.remove()
    student.train(was_training)
    difference = float((found[0] - expected).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        problem = f"the student's features differ from those of {start.name} by {difference:.1e}"
        raise UserError(f"start: {problem}. Use another model.")
    return difference


def select_weights(student: Student, weights: Mapping[str, Tensor], heads: int) -> int:
    """Select a student's weights from a larger network in place and return the number of selected parameters.

    ``weights`` are under the student's names, ``heads`` is the number of their attention heads. Weights without a
    counterpart stay unchanged.
    """
    names = _select(student, weights, heads)
    return sum(value.numel() for name, value in student.state_dict().items() if name in names)


def _select(student: Student, weights: Mapping[str, Tensor], heads: int) -> set[str]:
    """Select a student's weights in place and return the names of those that were selected."""
    state, names = student.state_dict(), set()
    for name, value in state.items():
        source = weights.get(name)
        if source is None or source.ndim != value.ndim:
            continue
        if name.endswith(_PIXEL_WEIGHTS) and source.shape[-1] != value.shape[-1]:
            # The norms of vit-pytorch have a weight for each pixel, and pixels of other patches do not correspond.
            if student.config.patch_norms:
                continue
            source = _resample_patches(source, student.config.patch_size)
        selected = _select_one(name, source, value, heads, student.config.heads)
        if selected is not None:
            state[name] = selected
            names.add(name)
    student.load_state_dict(state)
    return names


def _resample_patches(source: Tensor, patch_size: int) -> Tensor:
    """Resample (dim, row * column * channel) weights of patches to another size, as timm does."""
    from timm.layers import resample_patch_embed

    side = math.isqrt(source.shape[1] // 3)
    kernels = source.reshape(len(source), side, side, 3).permute(0, 3, 1, 2)
    resampled: Tensor = resample_patch_embed(kernels, [patch_size, patch_size])
    return resampled.permute(0, 2, 3, 1).reshape(len(source), -1)


def _select_one(name: str, source: Tensor, value: Tensor, source_heads: int, heads: int) -> Tensor | None:
    """Select one weight of ``value``'s shape. Return None if the source is too small."""
    if name.endswith("pos_embedding"):
        return _select_positions(source, value)
    if name.endswith("registers") and 0 < len(source) < len(value):
        # Registers that the start lacks stay new, after its own.
        kept = _select_evenly(source, (len(source), value.shape[1]))
        return None if kept is None else torch.cat([kept, value[len(source) :]])
    for end, parts in _HEAD_ROWS.items():
        if name.endswith(end):
            rows = _select_heads(source.reshape(len(source), -1), _as_rows(value), source_heads, heads, parts)
            return None if rows is None else rows.reshape(value.shape)
    if name.endswith(_HEAD_COLUMNS):
        transposed = _select_heads(source.T, value.shape[::-1], source_heads, heads, 1)
        return None if transposed is None else transposed.T
    return _select_evenly(source, value.shape)


def _as_rows(value: Tensor) -> tuple[int, int]:
    return len(value), value[0].numel()


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
