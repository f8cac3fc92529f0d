"""A teacher's layers in order of depth: which of them train, and how fast."""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import nn

from teacher.model import Teacher
from vpr.common.errors import UserError

Layer = list[tuple[str, nn.Parameter]]
_STEM, _END = -1, 1 << 20
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
_STAGE = re.compile(r"layer(\d)\.(\d+)\.")


def group_by_depth(teacher: Teacher) -> list[Layer]:
    """The parameters by depth, from the stem over each block to the output; every parameter once.

    The last layer holds the tower's final norm and projection and what is added to the tower.
    """
    groups: dict[int, Layer] = {}
    depths = _depths(teacher)
    for name, parameter in teacher.named_parameters():
        groups.setdefault(depths[name], []).append((name, parameter))
    return [groups[depth] for depth in sorted(groups)]


def decay_factor(index: int, total: int, decay: float) -> float:
    """Factor on the learning rate of a layer: 1 for the last, ``decay`` times the next one's for each before it.

    Clark et al., "ELECTRA", ICLR 2020; Bao et al., "BEiT", ICLR 2022.
    """
    return decay ** (total - 1 - index)


def freeze_except(
    teacher: Teacher, part: Literal["head", "tower", "last", "all"], last_blocks: int = 0
) -> list[nn.Module]:
    """Let a part of the teacher learn and freeze the rest.

    Args:
        teacher: changed in place (``requires_grad``).
        part: ``head`` is what is added to the tower; ``last`` the last blocks and what follows them.
        last_blocks: of ``last``.

    Returns:
        the modules that belong in training mode; the others keep their BatchNorm statistics and have no dropout.

    Raises:
        UserError: more blocks than there are.
    """
    if part != "last":
        teacher.visual.requires_grad_(part != "head")
        teacher.project.requires_grad_(part != "tower")
        parts: dict[str, nn.Module] = {"head": teacher.project, "tower": teacher.visual, "all": teacher}
        return [parts[part]]
    depths = _depths(teacher)
    blocks = sorted({depth for depth in depths.values() if _STEM < depth < _END})
    if last_blocks > len(blocks):
        raise UserError(f"stages.last_blocks: {last_blocks}, the tower has {len(blocks)} blocks: give at most that")
    first = blocks[-last_blocks]
    for name, parameter in teacher.named_parameters():
        parameter.requires_grad_(depths[name] >= first)
    learning = [m for m in teacher.modules() if list(m.parameters()) and all(p.requires_grad for p in m.parameters())]
    return [*learning, teacher.project]


def _depths(teacher: Teacher) -> dict[str, int]:
    """Depth of every parameter by its name in the teacher."""
    visual: Any = teacher.visual
    found = {name: _END for name, _ in teacher.named_parameters()}
    if hasattr(visual, "trunk"):
        from timm.models import group_parameters

        groups = group_parameters(visual.trunk, visual.trunk.group_matcher())
        for depth, names in groups.items():
            # Layer 0 of timm is the stem; its last one may hold what belongs to no block (a pooling, a norm).
            end = depth == max(groups) and not any(re.search(r"\.\d+\.", name) for name in names)
            found.update({f"visual.trunk.{name}": _END if end else int(depth) - 1 for name in names})
        return found
    for name in found:
        block, stage = _RESBLOCK.match(name.removeprefix("visual.")), _STAGE.match(name.removeprefix("visual."))
        if block:
            found[name] = int(block[1])
        elif stage:
            found[name] = 1000 * int(stage[1]) + int(stage[2])
        elif re.match(r"visual\.(conv\d|bn\d|class_embedding|positional_embedding|ln_pre)", name):
            found[name] = _STEM
    return found
