"""Quantisation-aware finishing: a student's linears computed as the INT8 graph will compute them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.inference.int8 import LEVELS, activation_scale, read_ranges, weight_scales


class FakeQuantLinear(nn.Module):
    """A linear whose input and weight pass through the export's Q/DQ, gradients straight through.

    The scale of the input is the calibrated one; those of the weight follow the weight as it learns. A
    value beyond its range has no gradient (Esser et al., "LSQ", ICLR 2020, eq. 3 for the data).

    Args:
        linear: its parameters are taken over, under their own names.
        threshold: magnitude of the input that maps to 127.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear, threshold: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("scale", torch.tensor(float(activation_scale(threshold))), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out), in float32 also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            scales = torch.from_numpy(weight_scales(self.weight.detach().float().cpu().numpy(), axis=0))
            weight = _fake(self.weight.float(), scales.to(x.device)[:, None], LEVELS)
            bias = None if self.bias is None else self.bias.float()
            return F.linear(_fake(x.float(), self.scale, LEVELS + 1), weight, bias)


def _fake(x: Tensor, scale: Tensor, least: int) -> Tensor:
    """Rounded to multiples of the scale from -least to 127; straight through where it rounds to one of them."""
    steps = torch.clamp(torch.round(x / scale), -least, LEVELS) * scale
    inside = torch.maximum(torch.minimum(x, scale * (LEVELS + 0.5)), -scale * (least + 0.5))
    return inside + (steps - inside).detach()


def insert_fake_quant(model: nn.Module, thresholds: dict[str, float], keep: tuple[str, ...]) -> list[str]:
    """Put Q/DQ around a network's linears in place; names of those that have it.

    Args:
        model: the network.
        thresholds: magnitude that maps to 127, by the name of a linear.
        keep: beginnings of names of linears to leave alone.

    Raises:
        UserError: a range of no linear, a linear without a range, a convolution that is not kept, or nothing left
            to quantise.
    """
    chosen = [name for name in thresholds if not name.startswith(keep)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not chosen:
        raise UserError("quantise.exclude_layers: leaves nothing to quantise: name fewer layers")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith(keep):
            raise UserError(
                f"quantise.exclude_layers: '{name}' is a convolution, finishing is of linears alone: keep it too"
            )
    for name in chosen:
        parent_name, _, own = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            linear = parent.get_submodule(own)
        except AttributeError:
            linear = parent = nn.Identity()
        if not isinstance(linear, nn.Linear):
            raise UserError(f"quantise.ranges: '{name}' is no linear of this student: calibrate its own graph")
        setattr(parent, own, FakeQuantLinear(linear, thresholds[name]))
    absent = [name for name in linears if name not in thresholds and not name.startswith(keep)]
    if absent:
        raise UserError(f"quantise.ranges: no range for '{absent[0]}': calibrate this student's own graph")
    return chosen


def check_ranges(ranges: Path | str, start: Path | str) -> None:
    """Refuse ranges that were not measured on the graph of the student that is to be finished."""
    student = load_artifact(start).as_parent("student")
    if student.sha256 not in {parent.sha256 for parent in load_artifact(ranges, "ranges").card.parents}:
        raise UserError(
            f"quantise.ranges: {ranges} is not of a graph of {start}: run 'vpr export onnx' and 'vpr calibrate' on it"
        )


def read_thresholds(path: Path | str) -> dict[str, float]:
    """Ranges by the name of each linear, from a ``ranges`` artifact.

    Raises:
        UserError: ranges that do not name their linears, or of a smoothed graph.
    """
    ranges = read_ranges(load_artifact(path, "ranges"))
    found = {name: ranges.thresholds[tensor] for tensor, names in ranges.linears.items() for name in names}
    if ranges.smoothing:
        raise UserError(f"{path}: of a smoothed graph: calibrate with --smooth false to finish a student")
    if not found:
        raise UserError(f"{path}: does not say which linears its ranges are of: calibrate again with this version")
    return found
