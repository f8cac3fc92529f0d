"""Angular margins, class sizes and the margin softmax, as pure functions.

Everything is computed in float32 at least, also under autocast, and keeps float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_EDGE = 1e-6  # a few float32 rounding steps inside cos = +-1, where the gradient of sqrt is infinite


def arcface_logits(cosine: Tensor, labels: Tensor, margin: Tensor | float, scale: float) -> Tensor:
    """ArcFace logits: the true class's angle is widened by ``margin`` before the softmax.

    s * cos(theta + m) for the true class, s * cos(theta) for the others (Deng et al., "ArcFace",
    CVPR 2019, eq. 3). Beyond theta = pi - m, where cos(theta + m) would rise again, the target is
    cos(theta) - m * sin(m), so that it keeps falling.

    Args:
        cosine: (batch, classes) float, in -1…1 up to rounding.
        labels: (batch,) int64.
        margin: radians, 0…pi/2; one for all, or (batch,) one for each target.
        scale: s, the inverse temperature.

    Returns:
        (batch, classes) float32 (float64 of a float64 input).
    """
    cosine = _wide(cosine)
    target = cosine.gather(1, labels[:, None])
    angle = torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device).expand(len(labels))[:, None]
    inside = target.clamp(-1 + _EDGE, 1 - _EDGE)
    widened = inside * torch.cos(angle) - torch.sqrt(1 - inside * inside) * torch.sin(angle)
    beyond = target - angle * torch.sin(angle)
    target = torch.where(inside > torch.cos(math.pi - angle), widened, beyond)
    return scale * cosine.scatter(1, labels[:, None], target)


def cosface_logits(cosine: Tensor, labels: Tensor, margin: Tensor | float, scale: float) -> Tensor:
    """CosFace logits: s * (cos(theta) - m) for the true class (Wang et al., "CosFace", CVPR 2018, eq. 4).

    Arguments and result are those of :func:`arcface_logits`; the margin is one of the cosine.
    """
    cosine = _wide(cosine)
    amount = torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device).expand(len(labels))[:, None]
    target = cosine.gather(1, labels[:, None]) - amount
    return scale * cosine.scatter(1, labels[:, None], target)


def nearest_centre(cosine: Tensor, centres: int) -> Tensor:
    """Sub-centre pooling: each class has ``centres`` directions and counts by the nearest (Deng et al., ECCV 2020).

    Args:
        cosine: (batch, classes * centres), the centres of a class side by side.
        centres: K.

    Returns:
        (batch, classes).
    """
    return cosine if centres == 1 else cosine.unflatten(1, (-1, centres)).amax(dim=2)


def margins_by_count(counts: Tensor, low: float, high: float) -> Tensor:
    """Margins by class size: ``low`` for the class of most images, ``high`` for that of fewest.

    m_c = low + (high - low) * (n_c^-p - min) / (max - min), with minimum and maximum over classes (Ha et al.,
    "Google Landmark Recognition 2020 Competition Third Place Solution", arXiv:2010.05350, sec. 2.2, p = 1/4).
    Where all classes are of one size, all margins are ``high``.

    Args:
        counts: (classes,) images of each class, at least 1.
        low: margin of the largest class.
        high: margin of the smallest.

    Returns:
        (classes,) float64.
    """
    rarity = counts.double() ** -0.25
    spread = rarity.max() - rarity.min()
    share = (rarity - rarity.min()) / spread if spread > 0 else torch.ones_like(rarity)
    return low + (high - low) * share


def growing_margin(progress: float, start: float, end: float) -> float:
    """Margin after a share ``progress`` (0…1) of the training, grown linearly."""
    return start + (end - start) * min(1.0, max(0.0, progress))


def stepped_margin(epoch: int, start: float, step: float, end: float) -> float:
    """Margin of an epoch (from 0): ``start + step * epoch``, at most ``end``."""
    return min(end, start + step * epoch)


def class_weights(counts: Tensor, power: float) -> Tensor:
    """Weights n_c^-p of the classes, scaled so that their mean over all *images* is 1.

    Args:
        counts: (classes,) images of each class.
        power: p; 0 weighs all alike, 1 gives every class the same total.

    Returns:
        (classes,) float64.
    """
    images = counts.double()
    weights = images**-power
    return weights * images.sum() / (weights * images).sum()


def margin_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy with label smoothing and class weights.

    The mean divides by the size of the batch, not by the sum of its weights (as ``F.cross_entropy`` does), so
    that the mean over processes is the mean over their joint batch.

    Args:
        logits: (batch, classes).
        labels: (batch,) int64.
        smoothing: share of the target spread over all classes (Szegedy et al., CVPR 2016, sec. 7).
        weights: (classes,), of an image by its label; none weighs all alike.
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    return (loss if weights is None else loss * weights[labels].to(loss.dtype)).mean()


def _wide(cosine: Tensor) -> Tensor:
    return cosine if cosine.dtype == torch.float64 else cosine.float()
