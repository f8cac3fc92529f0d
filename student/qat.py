"""Quantisation-aware training: linear layers compute as they do in the INT8 graph."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student.loss_config import LossConfig
from vpr.artifacts.store import Artifact
from vpr.common.errors import UserError, check_prefixes
from vpr.inference.config import DEFAULT_EXCLUDED_LAYERS
from vpr.inference.int8 import LEVELS, MIN_SCALE, activation_scale, read_ranges

_DROPPED_BITS = 23 - 10  # of the fraction of a float32 that is rounded to FP16


class FakeQuantLinear(nn.Module):
    """Linear layer whose input and weight pass through the export's Q/DQ, with straight-through gradients.

    ``threshold`` is the magnitude of the input that maps to 127; the scales of the weight follow the weight during
    training. Values outside their range have no gradient (Esser et al., "LSQ", ICLR 2020, eq. 3 for the data). The
    parameters of the original layer are reused under their names.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear, threshold: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("scale", torch.tensor(float(activation_scale(threshold))), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out), in float32 also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.float()
            weight = _fake_quantise(weight, scale_rows(weight.detach())[:, None], LEVELS)
            bias = None if self.bias is None else self.bias.float()
            return F.linear(_fake_quantise(x.float(), self.scale, LEVELS + 1), weight, bias)


def scale_rows(weight: Tensor) -> Tensor:
    """Return the (out,) float32 scales of an (out, in) float32 weight, on its device.

    They equal those that :func:`vpr.inference.int8.weight_scales` gives the export. A copy to the host would wait for
    the GPU, once for each layer. ``.half().float()`` would be dropped by torch.compile, so integers round to the bits
    of FP16, half to even. The rounding to float32 before changes nothing: a quotient of a float32 and 127 that is not
    halfway between two numbers of FP16 is not rounded to such a value.
    """
    bits = (weight.abs().amax(dim=1) / LEVELS).clamp_min(MIN_SCALE).view(torch.int32)
    is_odd = (bits >> _DROPPED_BITS) & 1
    bits = (bits + (1 << _DROPPED_BITS - 1) - 1 + is_odd) >> _DROPPED_BITS << _DROPPED_BITS
    return bits.view(torch.float32)


def _fake_quantise(x: Tensor, scale: Tensor, negative_levels: int) -> Tensor:
    """Round to multiples of the scale from ``-negative_levels`` to 127, with straight-through gradients."""
    rounded = torch.clamp(torch.round(x / scale), -negative_levels, LEVELS) * scale
    clipped = torch.maximum(torch.minimum(x, scale * (LEVELS + 0.5)), -scale * (negative_levels + 0.5))
    return clipped + (rounded - clipped).detach()


def insert_fake_quant(model: nn.Module, thresholds: dict[str, float], exclude_layers: tuple[str, ...]) -> list[str]:
    """Replace a network's linear layers by :class:`FakeQuantLinear` in place and return their names.

    ``thresholds`` are by the name of the layer; layers with a prefix in ``exclude_layers`` stay unchanged.

    Raises:
        UserError: A range without a layer, a layer without a range, a convolution that is not excluded, or no layer
            to quantise.
    """
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    own = [prefix for prefix in exclude_layers if prefix not in DEFAULT_EXCLUDED_LAYERS]
    check_prefixes("quantise.exclude_layers", own, modules)
    names = [name for name in thresholds if not name.startswith(exclude_layers)]
    if not names:
        raise UserError("quantise.exclude_layers: excludes all layers. Exclude fewer.")
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears.append(name)
        if isinstance(module, nn.Conv2d) and not name.startswith(exclude_layers):
            raise UserError(f"quantise.exclude_layers: QAT does not support the convolution '{name}'. Exclude it too.")
    for name in names:
        if name not in linears:
            raise UserError(f"quantise.ranges: this student has no linear layer '{name}'. Calibrate its own graph.")
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, attribute, FakeQuantLinear(parent.get_submodule(attribute), thresholds[name]))  # type: ignore[arg-type]
    for name in linears:
        if name not in thresholds and not name.startswith(exclude_layers):
            raise UserError(f"quantise.ranges: no range for the layer '{name}'. Calibrate this student's own graph.")
    return names


def check_ranges(ranges: Artifact, start: Artifact) -> None:
    """Raise :class:`UserError` if the ranges were not measured on a graph of the student ``start``."""
    if start.sha256 not in {parent.sha256 for parent in ranges.card.parents}:
        problem = f"{ranges.path} was not measured on a graph of {start.path}"
        raise UserError(f"quantise.ranges: {problem}. Run `vpr export onnx` and `vpr calibrate` on that student.")


def check_same_prefixes(losses: LossConfig, start: Artifact) -> None:
    """Raise :class:`UserError` if fine-tuning has other nested dimensions than the student, and so other targets."""
    nested = [] if start.card.embedding is None else start.card.embedding.nested
    if nested != list(losses.prefixes):
        trained = " ".join(map(str, nested)) or "none"
        raise UserError(f"losses.nested: {start.path} has the nested dimensions {trained}. Set the same ones.")


def read_thresholds(artifact: Artifact) -> dict[str, float]:
    """Return the threshold of each linear layer; raise :class:`UserError` without any or for a smoothed graph."""
    ranges = read_ranges(artifact)
    thresholds = {name: ranges.thresholds[tensor] for tensor, names in ranges.linears.items() for name in names}
    if ranges.smoothing:
        raise UserError(f"{artifact.path}: the graph was smoothed. Calibrate with --no-smooth for QAT.")
    if not thresholds:
        raise UserError(f"{artifact.path}: the ranges do not name their layers. Rerun `vpr calibrate`.")
    return thresholds
