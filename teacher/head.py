"""The margin head: one or more learned directions per class, and the loss of embeddings against them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.margin import (
    arcface_logits,
    class_weights,
    cosface_logits,
    growing_margin,
    margin_loss,
    margins_by_count,
    nearest_centre,
    stepped_margin,
)
from vpr.common.errors import UserError, check_numbers

_LOGITS = {"arcface": arcface_logits, "cosface": cosface_logits}


@dataclass(frozen=True)
class HeadConfig:
    """The margin softmax.

    Attributes:
        loss: ``arcface`` widens the angle (margins in radians), ``cosface`` lowers the cosine.
        scale: inverse temperature s.
        margin: at the start of the training.
        margin_end: at its end.
        margin_step: growth per epoch up to ``margin_end``; 0 grows evenly over the whole training.
        by_count: the class of most pictures has this share of the margin, that of fewest the whole, others lie
            between by the fourth root of their size; 1 gives every class the same.
        sub_centres: directions per class.
        label_smoothing: share of the target that is spread over all classes.
        class_weight_power: pictures of a class of n weigh n to the minus this; 0 weighs all alike.
    """

    loss: Literal["arcface", "cosface"] = "arcface"
    scale: float = 30.0
    margin: float = 0.3
    margin_end: float = 0.8
    margin_step: float = 0.0
    by_count: float = 1.0
    sub_centres: int = 1
    label_smoothing: float = 0.0
    class_weight_power: float = 0.0

    def __post_init__(self) -> None:
        most = math.pi / 2 if self.loss == "arcface" else 2.0
        if not 0 <= self.margin <= self.margin_end <= most:
            raise UserError(
                f"head.margin: {self.margin} to {self.margin_end}: give 0 or more, not falling, at most {most:.3g}"
            )
        check_numbers(self, "head.", sub_centres=(1, 100))
        if not 0 < self.scale <= 1000:
            raise UserError(f"head.scale: {self.scale}: give a number above 0, at most 1000")
        check_numbers(self, "head.", by_count=(0, 1), label_smoothing=(0, 1), class_weight_power=(0, 1))
        if not 0 <= self.margin_step < math.inf:
            raise UserError(f"head.margin_step: {self.margin_step}: give 0 or more")


class MarginHead(nn.Module):
    """Directions of the classes, and the margin loss.

    Args:
        dim: of the embeddings.
        counts: (classes,) int64, training pictures of each.
        config: the margin.
    """

    shares: Tensor
    weights: Tensor

    def __init__(self, dim: int, counts: Tensor, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(len(counts) * config.sub_centres, dim))
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("shares", margins_by_count(counts, config.by_count, 1.0).float(), persistent=False)
        self.register_buffer("weights", class_weights(counts, config.class_weight_power).float(), persistent=False)

    def margin(self, progress: float, epoch: int) -> float:
        """The largest margin of any class after a share of the training, in its epoch from 0."""
        config = self.config
        if config.margin_step:
            return stepped_margin(epoch, config.margin, config.margin_step, config.margin_end)
        return growing_margin(progress, config.margin, config.margin_end)

    def cosine(self, embeddings: Tensor) -> Tensor:
        """(batch, dim) of unit length to (batch, classes) cosines with the nearest direction of each, float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            directions = F.normalize(self.weight.float(), dim=1)
            return nearest_centre(F.linear(embeddings.float(), directions), self.config.sub_centres)

    def forward(self, embeddings: Tensor, labels: Tensor, progress: float, epoch: int) -> Tensor:
        """Loss of L2-normalised (batch, dim) embeddings and (batch,) int64 labels, in float32 also under autocast."""
        config = self.config
        with torch.autocast(embeddings.device.type, enabled=False):
            margins = self.margin(progress, epoch) * self.shares[labels]
            logits = _LOGITS[config.loss](self.cosine(embeddings), labels, margins, config.scale)
            weights = self.weights if config.class_weight_power else None
            return margin_loss(logits, labels, config.label_smoothing, weights)
