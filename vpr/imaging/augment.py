"""Seeded augmentation: view k of image i is the same image for teacher and student.

A view is a pure function of ``(seed, index, view)``, whatever its batch. So a teacher's embedding of a view can be
computed once and cached, and it matches the pixels that the student sees later (Beyer et al., "Knowledge
distillation: a good teacher is patient and consistent", CVPR 2022: teacher and student must see the same crop).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vpr.imaging.config import ViewConfig

# Rec. 601 luma, the greyscale weights of Pillow and torchvision.
_LUMA = (0.299, 0.587, 0.114)
_DRAWS = 16


def draw_views(config: ViewConfig, seed: int, index: Tensor, view: Tensor) -> Tensor:
    """Draw the (batch, 14) float32 parameters of views for :func:`apply_views`.

    ``index`` is the (batch,) int64 row of each image in its table, ``view`` the (batch,) int64 number of its view.
    """
    rows = np.empty((len(index), _DRAWS), dtype=np.float32)
    for row, (i, v) in enumerate(zip(index.tolist(), view.tolist(), strict=True)):
        rows[row] = np.random.Generator(np.random.Philox(key=[seed, (i << 24) + v])).random(_DRAWS)
    u = torch.from_numpy(rows)
    s = 2 * u - 1
    low, high = np.log(config.scale[0]), np.log(config.scale[1])
    jitter = torch.where(u[:, 14] < config.jitter, 1.0, 0.0)
    colour = torch.where(u[:, 15] < config.grey, 0.0, 1.0)
    columns = [
        s[:, 0] * config.rotate * (torch.pi / 180),
        torch.exp(low + u[:, 1] * (high - low)),
        torch.exp(s[:, 2] * config.stretch / 2),
        s[:, 3] * config.translate * 2,
        s[:, 4] * config.translate * 2,
        torch.where(u[:, 5] < config.flip, -1.0, 1.0),
        1 + s[:, 6] * config.brightness * jitter,
        1 + s[:, 7] * config.contrast * jitter,
        (1 + s[:, 8] * config.saturation * jitter) * colour,
        s[:, 9] * config.tint * jitter,
        s[:, 10] * config.tint * jitter,
        torch.where(u[:, 11] < config.cutout, config.cutout_size * (u[:, 11] / max(config.cutout, 1e-9)), 0.0),
        u[:, 12],
        u[:, 13],
    ]
    return torch.stack(columns, dim=1)


def apply_views(pixels: Tensor, parameters: Tensor) -> Tensor:
    """Apply (batch, 14) parameters of :func:`draw_views`, on any device, to images.

    Maps (batch, 3, height, width) uint8 to float32 in 0…255 of the same shape, on the device of ``pixels``.
    """
    # In the 16 bits of autocast the sampling grid would be off by a fifth of a pixel.
    with torch.autocast(pixels.device.type, enabled=False):
        return _apply(pixels, parameters)


def _apply(pixels: Tensor, parameters: Tensor) -> Tensor:
    p = parameters.to(pixels.device)
    batch, _, height, width = pixels.shape
    cos, sin = torch.cos(p[:, 0]), torch.sin(p[:, 0])
    x_zoom, y_zoom = 1 / (p[:, 1] * p[:, 2]), p[:, 2] / p[:, 1]
    rows = [cos * x_zoom * p[:, 5], -sin * y_zoom, p[:, 3], sin * x_zoom * p[:, 5], cos * y_zoom, p[:, 4]]
    theta = torch.stack(rows, dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, [batch, 3, height, width], align_corners=False)
    x = F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _cutout(_recolour(x, p), p)


def _recolour(x: Tensor, p: Tensor) -> Tensor:
    gain = torch.stack([p[:, 9], -(p[:, 9] + p[:, 10]) / 2, p[:, 10]], dim=1) + 1
    x = x * (gain * p[:, 6:7])[:, :, None, None]
    luma = (x * x.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    x = luma + (x - luma) * p[:, 8, None, None, None]
    mean = luma.mean(dim=(2, 3), keepdim=True)
    return (mean + (x - mean) * p[:, 7, None, None, None]).clamp(0, 255)


def _cutout(x: Tensor, p: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device)[None, :] / height - p[:, 12, None]
    cols = torch.arange(width, device=x.device)[None, :] / width - p[:, 13, None]
    half = p[:, 11, None] / 2
    hole = (rows.abs() < half)[:, :, None] & (cols.abs() < half)[:, None, :]
    return torch.where(hole[:, None], x.new_tensor(127.5), x)
