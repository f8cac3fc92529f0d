"""Configuration of the augmentation. Imports no heavy library, so help and argument errors are instant."""

import math
from dataclasses import dataclass

from vpr.common.errors import UserError, check_numbers


@dataclass(frozen=True)
class ViewConfig:
    """Ranges of the augmentation. A single number is a symmetric range.

    Attributes:
        rotate: Largest rotation in degrees.
        scale: Smallest and largest zoom. Above 1, ``translate`` makes it a random crop.
        stretch: Largest relative change of the aspect ratio.
        translate: Largest shift, as a fraction of the side.
        flip: Probability of a horizontal flip.
        brightness: Largest relative change of brightness.
        contrast: Largest relative change of contrast.
        saturation: Largest relative change of saturation.
        tint: Largest relative gain of a colour channel, as from coloured light.
        cutout: Probability that a grey square replaces part of the image.
        cutout_size: Largest side of this square, as a fraction of the side.
        jitter: Probability that brightness, contrast, saturation and tint change.
        grey: Probability of an image without colour.
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
        share = (0, 1)
        check_numbers(self, "views.", flip=share, cutout=share, cutout_size=share, jitter=share, grey=share)
        for name in ("rotate", "stretch", "translate", "brightness", "contrast", "saturation", "tint"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"views.{name}: expected a finite number of 0 or more, got {getattr(self, name)}.")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise UserError(f"views.scale: expected smallest and largest zoom, above 0, got {list(self.scale)}.")
