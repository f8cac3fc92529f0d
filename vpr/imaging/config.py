"""Configuration of the augmentation. Imports no heavy library, so help and errors in arguments are quick."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vpr.common.errors import UserError


@dataclass(frozen=True)
class ViewConfig:
    """How far a view may depart from the image. All ranges are symmetric unless they are pairs.

    Attributes:
        rotate: largest rotation, degrees.
        scale: smallest and largest magnification of the content; above 1, with ``translate``, it is a random crop.
        stretch: largest relative change of the aspect ratio.
        translate: largest shift, as a fraction of the side.
        flip: probability of a horizontal flip.
        brightness: largest relative change of brightness.
        contrast: largest relative change of contrast.
        saturation: largest relative change of saturation.
        tint: largest relative gain of each colour channel on its own (coloured light).
        cutout: probability that a rectangle is replaced by grey.
        cutout_size: largest side of that rectangle, as a fraction of the side.
        jitter: probability that brightness, contrast, saturation and tint change at all.
        grey: probability of an image without colour.
    """

    rotate: float = 15.0
    scale: tuple[float, float] = (0.75, 1.2)
    stretch: float = 0.15
    translate: float = 0.12
    flip: float = 0.5
    brightness: float = 0.35
    contrast: float = 0.35
    saturation: float = 0.4
    tint: float = 0.15
    cutout: float = 0.0
    cutout_size: float = 0.4
    jitter: float = 1.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "cutout", "cutout_size", "jitter", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"views.{name}: {getattr(self, name)}: give a share, 0 to 1")
        for name in ("rotate", "stretch", "translate", "brightness", "contrast", "saturation", "tint"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"views.{name}: {getattr(self, name)}: give a range of 0 or more")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise UserError(f"views.scale: {list(self.scale)}: give the smallest and the largest, above 0")
