"""Angular-margin softmax, as pure functions of cosines and labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def arcface_logits(cosine: Tensor, labels: Tensor, margin: float, scale: float) -> Tensor:
    """ArcFace logits: the true class's angle is widened by ``margin`` before the softmax.

    s * cos(theta + m) for the true class, s * cos(theta) for the others (Deng et al., "ArcFace",
    CVPR 2019, eq. 3). Beyond theta = pi - m, where cos(theta + m) would rise again, the target is
    cos(theta) - m * sin(m), so that it keeps falling.

    Args:
        cosine: (batch, classes) float, in -1…1 up to rounding.
        labels: (batch,) int64.
        margin: radians, 0…pi/2.
        scale: s, the inverse temperature.

    Returns:
        (batch, classes) float32.
    """
    cosine = cosine.float()
    target = cosine.gather(1, labels[:, None])
    # The gradient of sqrt is infinite at 0: cosines of +-1 are held one float32 rounding step away.
    inside = target.clamp(-1 + 1e-6, 1 - 1e-6)
    widened = inside * math.cos(margin) - torch.sqrt(1 - inside * inside) * math.sin(margin)
    beyond = target - margin * math.sin(margin)
    target = torch.where(inside > math.cos(math.pi - margin), widened, beyond)
    return scale * cosine.scatter(1, labels[:, None], target)


def growing_margin(progress: float, start: float, end: float) -> float:
    """Margin in radians after a share ``progress`` (0…1) of the training, grown linearly."""
    return start + (end - start) * min(1.0, max(0.0, progress))


class ArcFaceHead(nn.Module):
    """One learned direction per class, and the loss of embeddings against them.

    Args:
        dim: of the embeddings.
        classes: number of products in training.
        scale: s of :func:`arcface_logits`.
    """

    def __init__(self, dim: int, classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
        """Cross-entropy of L2-normalised (batch, dim) embeddings, in float32 also under autocast."""
        with torch.autocast(embeddings.device.type, enabled=False):
            cosine = F.linear(embeddings.float(), F.normalize(self.weight.float(), dim=1))
            return F.cross_entropy(arcface_logits(cosine, labels, margin, self.scale), labels)
