"""Margin head: learned directions per class, and the loss of embeddings against them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher import margin
from teacher.config import HeadConfig

_LOGITS = {"arcface": margin.arcface_logits, "cosface": margin.cosface_logits}


class MarginHead(nn.Module):
    """Class directions and the margin loss; ``counts`` is the (classes,) int64 number of training images."""

    shares: Tensor
    weights: Tensor

    def __init__(self, dim: int, counts: Tensor, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(len(counts) * config.sub_centres, dim))
        nn.init.xavier_uniform_(self.weight)
        shares = margin.margins_by_count(counts, config.min_margin_ratio, 1.0).float()
        weights = margin.class_weights(counts, config.class_weight_power).float()
        self.register_buffer("shares", shares, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def margin(self, progress: float, epoch: int) -> float:
        """Return the largest margin of any class; ``progress`` is a share of the training, ``epoch`` counts from 0."""
        config = self.config
        if config.margin_step:
            return margin.stepped_margin(epoch, config.margin, config.margin_step, config.margin_end)
        return margin.growing_margin(progress, config.margin, config.margin_end)

    def cosine(self, embeddings: Tensor) -> Tensor:
        """Map L2-normalised (batch, dim) to (batch, classes) float32 cosines with each class's nearest direction.

        Embeddings of fewer dimensions, nested prefixes, are compared with the first dimensions of the directions
        (Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022, section 3, MRL-E).
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            directions = F.normalize(self.weight[:, : embeddings.shape[1]].float(), dim=1)
            return margin.nearest_centre(F.linear(embeddings.float(), directions), self.config.sub_centres)

    def forward(self, embeddings: Tensor, labels: Tensor, progress: float, epoch: int) -> Tensor:
        """Return the loss of L2-normalised (batch, dim) embeddings with (batch,) int64 labels; always in float32."""
        config = self.config
        with torch.autocast(embeddings.device.type, enabled=False):
            margins = self.margin(progress, epoch) * self.shares[labels]
            logits = _LOGITS[config.loss](self.cosine(embeddings), labels, margins, config.scale)
            weights = self.weights if config.class_weight_power else None
            return margin.margin_loss(logits, labels, config.label_smoothing, weights)
