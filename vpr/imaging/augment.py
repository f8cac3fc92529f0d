"""Seeded augmentation: view k of image i is the same image for teacher and student.

A view is a pure function of ``(seed, index, view)``, whatever its batch. So a teacher's embedding of a view can be
computed once and cached, and it matches the pixels that the student sees later (Beyer et al., "Knowledge
distillation: a good teacher is patient and consistent", CVPR 2022: teacher and student must see the same crop).
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vpr.common.transfer import constant, to_device
from vpr.imaging.config import SHARPNESS_MARGIN, ViewConfig
from vpr.imaging.philox import draw_uniform

# Rec. 601 luma, the greyscale weights of Pillow and torchvision.
_LUMA = (0.299, 0.587, 0.114)
_HUE_OFFSETS = (5.0, 3.0, 1.0)  # of red, green and blue, see _shift_hue
_DRAWS = 20
_STEPS = 4  # reduced images for each factor of two


def draw_views(config: ViewConfig, seed: int, index: Tensor, view: Tensor) -> Tensor:
    """Draw the (batch, 17) float32 parameters of views for :func:`apply_views`.

    ``index`` is the (batch,) int64 row of each image in its table, ``view`` the (batch,) int64 number of its view.
    """
    keys = (index.cpu().numpy() << 24) + view.cpu().numpy()
    u = torch.from_numpy(draw_uniform(seed, keys.astype(np.uint64), _DRAWS).astype(np.float32))
    s = 2 * u - 1
    low, high = np.log(config.scale[0]), np.log(config.scale[1])
    jitter = torch.where(u[:, 14] < config.jitter, 1.0, 0.0)
    colour = torch.where(u[:, 15] < config.grey, 0.0, 1.0)
    moves = torch.where(u[:, 16] < config.affine, 1.0, 0.0)
    smallest = config.cutout_min_size or config.cutout_size
    columns = [
        s[:, 0] * config.rotate * (torch.pi / 180) * moves,
        torch.exp((low + u[:, 1] * (high - low)) * moves),
        torch.exp(s[:, 2] * config.stretch / 2 * moves),
        s[:, 3] * config.translate * 2 * moves,
        s[:, 4] * config.translate * 2 * moves,
        torch.where(u[:, 5] < config.flip, -1.0, 1.0),
        1 + s[:, 6] * config.brightness * jitter,
        1 + s[:, 7] * config.contrast * jitter,
        (1 + s[:, 8] * config.saturation * jitter) * colour,
        s[:, 9] * config.tint * jitter,
        s[:, 10] * config.tint * jitter,
        torch.where(u[:, 11] < config.cutout, smallest + u[:, 17] * (config.cutout_size - smallest), 0.0),
        u[:, 12],
        u[:, 13],
        s[:, 18] * config.hue * jitter,
        torch.full_like(u[:, 0], config.cutout_fill * 255),
        torch.full_like(u[:, 0], float(config.border == "black")),
    ]
    return torch.stack(columns, dim=1)


def apply_views(pixels: Tensor, parameters: Tensor, size: int) -> Tensor:
    """Apply (batch, 17) parameters of :func:`draw_views` to images. Parameters on the CPU never wait for a GPU.

    Maps (batch, 3, side, side) uint8 to (batch, 3, size, size) float32 in 0…255 on the device of ``pixels``. Views are
    sampled bicubically, and as sharp as images of ``size`` pixels if ``side`` is at least
    :meth:`ViewConfig.decoded_side`. Images with more pixels than their view needs are reduced first, against aliasing.
    """
    # In the 16 bits of autocast the sampling grid would be off by a fifth of a pixel.
    with torch.autocast(pixels.device.type, enabled=False):
        # Read before the parameters move.
        has_hue, has_hole, is_black = (bool(parameters[:, column].any()) for column in (14, 11, 16))
        sides = _reduced_sides(parameters[:, 1], pixels.shape[-1], size)
        p = to_device(parameters, pixels.device)
        x = _sample(pixels, p, size, "zeros" if is_black else "border", sides)
        x = _recolour(_shift_hue(x, p[:, 14]) if has_hue else x, p)
        return _cutout(x, p) if has_hole else x


def _reduced_sides(zooms: Tensor, side: int, size: int) -> NDArray[np.int64]:
    """Return the (batch,) side that each image is reduced to before it is sampled, in steps of a fourth root of two."""
    needed = size * SHARPNESS_MARGIN * zooms.double().cpu().numpy()
    steps = np.floor(_STEPS * np.log2(side / needed) + 1e-6).clip(0)
    return np.ceil(side * 2.0 ** (-steps / _STEPS)).astype(np.int64)


def _sample(pixels: Tensor, p: Tensor, size: int, padding: str, sides: NDArray[np.int64]) -> Tensor:
    batch = len(pixels)
    cos, sin = torch.cos(p[:, 0]), torch.sin(p[:, 0])
    x_zoom, y_zoom = 1 / (p[:, 1] * p[:, 2]), p[:, 2] / p[:, 1]
    rows = [cos * x_zoom * p[:, 5], -sin * y_zoom, p[:, 3], sin * x_zoom * p[:, 5], cos * y_zoom, p[:, 4]]
    theta = torch.stack(rows, dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, [batch, 3, size, size], align_corners=False)
    x = torch.empty(batch, 3, size, size, device=pixels.device)
    by_side = to_device(torch.from_numpy(np.argsort(sides, kind="stable")), pixels.device)
    values, counts = np.unique(sides, return_counts=True)
    for side, chosen in zip(values.tolist(), by_side.split(counts.tolist()), strict=True):
        images = pixels[chosen].float()
        if side < pixels.shape[-1]:
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        x[chosen] = F.grid_sample(images, grid[chosen], mode="bicubic", padding_mode=padding, align_corners=False)
    return x.clamp_(0, 255)  # bicubic weights overshoot at edges


def _recolour(x: Tensor, p: Tensor) -> Tensor:
    """Apply tint, brightness, saturation and contrast, all linear, as one gain per channel plus a share of the luma."""
    gain = (torch.stack([p[:, 9], -(p[:, 9] + p[:, 10]) / 2, p[:, 10]], dim=1) + 1) * p[:, 6:7]
    weights = (gain * constant(_LUMA, x.device))[:, :, None, None]
    luma = torch.addcmul(torch.addcmul(x[:, 0] * weights[:, 0], x[:, 1], weights[:, 1]), x[:, 2], weights[:, 2])
    contrast, saturation = p[:, 7, None, None], p[:, 8, None, None]
    mean = luma.mean(dim=(1, 2), keepdim=True)
    grey = torch.addcmul((1 - contrast) * mean, luma, contrast * (1 - saturation))
    return torch.addcmul(grey[:, None], x, gain[:, :, None, None] * (contrast * saturation)[:, None]).clamp_(0, 255)


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of (batch, 3, height, width) images by (batch,) shares of the colour circle.

    Value and chroma of HSV stay, so that each channel is value - chroma * clamp(min(k, 4 - k), 0, 1) with
    k = (n + 6 hue) mod 6 and n = 5, 3, 1 for red, green and blue.
    """
    value, chroma = x.amax(dim=1), x.amax(dim=1) - x.amin(dim=1)
    red, green, blue = x.unbind(dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == red, (green - blue) / safe, torch.zeros_like(value))
    hue = torch.where((value == green) & (value != red), 2 + (blue - red) / safe, hue)
    hue = torch.where((value == blue) & (value != red) & (value != green), 4 + (red - green) / safe, hue)
    k = (constant(_HUE_OFFSETS, x.device)[:, None, None] + (hue + 6 * shift[:, None, None])[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _cutout(x: Tensor, p: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    rows = (torch.arange(height, device=x.device)[None, :] + 0.5) / height - p[:, 12, None]
    cols = (torch.arange(width, device=x.device)[None, :] + 0.5) / width - p[:, 13, None]
    half = p[:, 11, None] / 2
    hole = (rows.abs() < half)[:, :, None] & (cols.abs() < half)[:, None, :]
    return torch.where(hole[:, None], p[:, 15, None, None, None], x)
