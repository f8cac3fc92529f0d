"""Layers of a teacher by depth: freezing and layer-wise learning-rate decay."""

import re
from typing import Any, Literal

from torch import nn

from teacher.model import Teacher
from vpr.common.errors import UserError

Layer = list[tuple[str, nn.Parameter]]
_STEM, _END = -1, 1 << 20
# For models of timm that have none of their own.
_MATCHER = {"stem": r"^(?:stem|patch_embed|pos_embed|cls_token)", "blocks": r"^(?:stages|transformers|blocks)\.(\d+)"}
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
_STAGE = re.compile(r"layer(\d)\.(\d+)\.")


def group_by_depth(teacher: Teacher) -> list[Layer]:
    """Return all parameters grouped by depth, from the stem through each block to the output.

    The last group holds the tower's final norm and projection, and the layers added to the tower.
    """
    groups: dict[int, Layer] = {}
    depths = _depths(teacher)
    for name, parameter in teacher.named_parameters():
        groups.setdefault(depths[name], []).append((name, parameter))
    return [groups[depth] for depth in sorted(groups)]


def decay_factor(index: int, total: int, decay: float) -> float:
    """Return the factor on a layer's learning rate: 1 for the last, times ``decay`` for each layer before it.

    Clark et al., "ELECTRA", ICLR 2020; Bao et al., "BEiT", ICLR 2022.
    """
    return decay ** (total - 1 - index)


def freeze_except(
    teacher: Teacher, part: Literal["head", "classes", "projection", "tower", "last", "all"], last_blocks: int = 0
) -> list[nn.Module]:
    """Freeze the teacher except one part (``requires_grad``) and return the modules to set to training mode.

    ``head`` and ``projection`` are what is added to the tower, ``classes`` is nothing of the teacher, ``last`` the last
    blocks and all layers after. The other modules keep their BatchNorm statistics. The dropout after the tower is on in
    every stage, that inside the tower only where it is trained.

    Raises:
        UserError: The tower has fewer than ``last_blocks`` blocks.
    """
    if part != "last":
        teacher.visual.requires_grad_(part in ("tower", "all"))
        teacher.project.requires_grad_(part in ("head", "projection", "all"))
        modules = (teacher.visual, teacher.project)
        dropout = [module for name, module in teacher.project.named_children() if name == "dropout"]
        return [*(m for m in modules if any(p.requires_grad for p in m.parameters())), *dropout]
    depths = _depths(teacher)
    blocks = sorted({depth for depth in depths.values() if _STEM < depth < _END})
    if last_blocks > len(blocks):
        raise UserError(f"stages.last_blocks: expected at most {len(blocks)}, the tower's blocks, got {last_blocks}.")
    first = blocks[-last_blocks]
    for name, parameter in teacher.named_parameters():
        parameter.requires_grad_(depths[name] >= first)
    trainable = [m for m in teacher.modules() if list(m.parameters()) and all(p.requires_grad for p in m.parameters())]
    return [*trainable, teacher.project]


def _depths(teacher: Teacher) -> dict[str, int]:
    """Return the depth of every parameter of the teacher by name."""
    visual: Any = teacher.visual
    depths = {name: _END for name, _ in teacher.named_parameters()}
    if hasattr(visual, "trunk"):
        from timm.models import group_parameters

        matcher = visual.trunk.group_matcher() if hasattr(visual.trunk, "group_matcher") else _MATCHER
        groups = group_parameters(visual.trunk, matcher)
        for depth, names in groups.items():
            # timm's group 0 is the stem; its last group may hold layers outside the blocks (a pooling, a norm).
            is_end = depth == max(groups) and not any(re.search(r"\.\d+\.", name) for name in names)
            depths.update({f"visual.trunk.{name}": _END if is_end else int(depth) - 1 for name in names})
        return depths
    for name in depths:
        block, stage = _RESBLOCK.match(name.removeprefix("visual.")), _STAGE.match(name.removeprefix("visual."))
        if block:
            depths[name] = int(block[1])
        elif stage:
            depths[name] = 1000 * int(stage[1]) + int(stage[2])
        elif re.match(r"visual\.(conv\d|bn\d|class_embedding|positional_embedding|ln_pre)", name):
            depths[name] = _STEM
    return depths
