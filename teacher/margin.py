"""Angular margins, class weights and the margin softmax, as pure functions.

All functions compute in float32 or, for float64 inputs, in float64, also under autocast.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_EDGE = 1e-6  # keeps |cos| a few float32 rounding steps below 1, where the gradient of sqrt is infinite


def arcface_logits(cosine: Tensor, labels: Tensor, margin: Tensor | float, scale: float) -> Tensor:
    """Return ArcFace logits: the angle of the true class is widened by ``margin``.

    s * cos(theta + m) for the true class, s * cos(theta) for the others (Deng et al., "ArcFace",
    CVPR 2019, eq. 3). Beyond theta = pi - m, where cos(theta + m) would rise again, the target is
    cos(theta) - m * sin(m), so that it keeps falling.
    ``cosine`` is (batch, classes), -1 to 1 up to rounding, ``labels`` (batch,) int64, ``scale`` is s. The margin in
    radians, 0 to pi/2, is one for all or (batch,) one for each target.
    """
    cosine = _at_least_float32(cosine)
    target = cosine.gather(1, labels[:, None])
    angle = torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device).expand(len(labels))[:, None]
    inside = target.clamp(-1 + _EDGE, 1 - _EDGE)
    widened = inside * torch.cos(angle) - torch.sqrt(1 - inside * inside) * torch.sin(angle)
    beyond = target - angle * torch.sin(angle)
    target = torch.where(inside > torch.cos(math.pi - angle), widened, beyond)
    return scale * cosine.scatter(1, labels[:, None], target)


def cosface_logits(cosine: Tensor, labels: Tensor, margin: Tensor | float, scale: float) -> Tensor:
    """Return CosFace logits: s * (cos(theta) - m) for the true class (Wang et al., "CosFace", CVPR 2018, eq. 4).

    Arguments and result are those of :func:`arcface_logits`; the margin is subtracted from the cosine.
    """
    cosine = _at_least_float32(cosine)
    amount = torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device).expand(len(labels))[:, None]
    target = cosine.gather(1, labels[:, None]) - amount
    return scale * cosine.scatter(1, labels[:, None], target)


def nearest_centre(cosine: Tensor, centres: int) -> Tensor:
    """Return the (batch, classes) cosine with the nearest of each class's directions (Deng et al., ECCV 2020).

    ``cosine`` is (batch, classes * centres), the centres of a class next to each other.
    """
    return cosine if centres == 1 else cosine.unflatten(1, (-1, centres)).amax(dim=2)


def margins_by_count(counts: Tensor, low: float, high: float) -> Tensor:
    """Return (classes,) float64 margins: ``low`` for the largest class, ``high`` for the smallest.

    m_c = low + (high - low) * (n_c^-p - min) / (max - min), with minimum and maximum over classes (Ha et al.,
    "Google Landmark Recognition 2020 Competition Third Place Solution", arXiv:2010.05350, sec. 2.2, p = 1/4).
    If all classes have the same size, all margins are ``high``. ``counts`` are the images of each class, at least 1.
    """
    rarity = counts.double() ** -0.25
    extent = rarity.max() - rarity.min()
    share = (rarity - rarity.min()) / extent if extent > 0 else torch.ones_like(rarity)
    return low + (high - low) * share


def growing_margin(progress: float, start: float, end: float) -> float:
    """Return the linearly growing margin after a share ``progress`` (0 to 1) of the training."""
    return start + (end - start) * min(1.0, max(0.0, progress))


def stepped_margin(epoch: int, start: float, step: float, end: float) -> float:
    """Return the margin of an epoch (from 0): ``start + step * epoch``, at most ``end``."""
    return min(end, start + step * epoch)


def class_weights(counts: Tensor, power: float) -> Tensor:
    """Return (classes,) float64 weights n_c^-p, scaled so that their mean over all *images* is 1.

    Power 0 weights all images alike, 1 gives every class the same total weight.
    """
    images = counts.double()
    weights = images**-power
    return weights * images.sum() / (weights * images).sum()


def margin_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy with label smoothing and (classes,) weights of an image by its label.

    The mean divides by the batch size. ``F.cross_entropy`` divides by the sum of the weights; the mean over processes
    would then differ from the mean over their joint batch. ``smoothing`` is the share of the target that is spread over
    all classes (Szegedy et al., CVPR 2016, sec. 7).
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    return (loss if weights is None else loss * weights[labels].to(loss.dtype)).mean()


def _at_least_float32(cosine: Tensor) -> Tensor:
    return cosine if cosine.dtype == torch.float64 else cosine.float()
