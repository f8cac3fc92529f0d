"""Configuration of the augmentation. Imports no heavy library, so help and argument errors are instant."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from vpr.common.errors import UserError, check_numbers

# Factors from the side of a view to the side that images are decoded at. Interpolation between pixels blurs, which the
# margin makes up for (`python -m experiments.teacher.view_sharpness`).
SHARPNESS_MARGIN, _LARGEST_FACTOR = 1.125, 2.0


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
        cutout: Probability that a square replaces part of the image. Its centre is uniform over the image, so that a
            part of it may be outside (DeVries and Taylor, "Improved Regularization of CNNs with Cutout", 2017).
        cutout_size: Side of this square, as a fraction of the side.
        jitter: Probability that brightness, contrast, saturation and tint change.
        grey: Probability of an image without colour.
        hue: Largest change of the hue, as a share of the colour circle, at most 0.5.
        affine: Probability that rotation, zoom, stretch and shift apply.
        border: Pixels beyond the edge of the image; ``edge`` repeats the last ones.
        cutout_min_size: Side of the smallest square. 0 keeps all squares at ``cutout_size``.
        cutout_fill: Grey level of the square, as a share of white.
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
    hue: float = 0.0
    affine: float = 1.0
    border: Literal["edge", "black"] = "edge"
    cutout_min_size: float = 0.0
    cutout_fill: float = 0.5

    def __post_init__(self) -> None:
        share = (0, 1)
        check_numbers(self, "views.", flip=share, cutout=share, cutout_size=share, jitter=share, grey=share)
        check_numbers(self, "views.", hue=(0, 0.5), affine=share, cutout_fill=share)
        check_numbers(self, "views.", cutout_min_size=(0, self.cutout_size))
        for name in ("rotate", "stretch", "translate", "brightness", "contrast", "saturation", "tint"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"views.{name}: expected a finite number of 0 or more, got {getattr(self, name)}.")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise UserError(f"views.scale: expected smallest and largest zoom, above 0, got {list(self.scale)}.")

    @property
    def has_geometry(self) -> bool:
        """Whether a view is sampled at other places than the pixels of the image, up to flips."""
        moves = any((self.rotate, self.stretch, self.translate)) or tuple(self.scale) != (1, 1)
        return moves and self.affine > 0

    def decoded_side(self, size: int) -> int:
        """Return the side in pixels to decode images at for views of ``size`` pixels.

        It is ``size`` times the largest zoom, and an eighth more, so that a magnified view is as sharp as an image that
        is scored. Memory grows with its square, so the factor is at most 2.
        """
        factor = max(self.scale[1], 1.0) * SHARPNESS_MARGIN if self.has_geometry else 1.0
        return math.ceil(size * min(factor, _LARGEST_FACTOR))

    def later_keys(self) -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        cutout = () if self.cutout else ("cutout_min_size", "cutout_fill")  # squares had random sides before
        return ("hue", "affine", "border", *cutout)

    def derived_values(self) -> dict[str, Any]:
        """Return what cards record of the sampling: it was bilinear, from images of the size of the view, before."""
        return {"sampling": "bicubic"} if self.has_geometry else {}
