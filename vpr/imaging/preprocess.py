"""The one preprocessing that training, evaluation and deployment share."""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Bounded, so that no card can produce an infinite or NaN input.
_Mean = Annotated[float, Field(ge=-10, le=10)]
_Std = Annotated[float, Field(ge=1e-3, le=10)]


class Preprocess(BaseModel):
    """Convert an image to the model's input, as recorded in an artifact's card.

    Attributes:
        size: Side of the square input, in pixels.
        resize: ``squash`` resizes to the square; ``shortest`` resizes the shorter side to ``size``.
        crop: ``none`` (with ``squash``) or ``center``.
        interpolation: Filter of the resize, antialiased.
        mean: Mean of each channel, for values in 0…1.
        std: Standard deviation of each channel, for values in 0…1.
        layout: Order of the axes of a batch.
        dtype: Data type of the model's input.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=16, le=2048)
    resize: Literal["squash", "shortest"] = "squash"
    crop: Literal["none", "center"] = "none"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[_Mean, _Mean, _Mean] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[_Std, _Std, _Std] = (0.26862954, 0.26130258, 0.27577711)
    layout: Literal["NCHW"] = "NCHW"
    dtype: Literal["float32"] = "float32"

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop an RGB image to (3, size, size) uint8."""
        box = None if self.resize == "squash" else _center_crop_box(image.width, image.height, self.size)
        image = image.resize((self.size, self.size), _RESAMPLING[self.interpolation], box)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Normalise (batch, 3, size, size) uint8 to float32 of the same shape."""
        scale, offset = self.scale_offset()
        return pixels.astype(np.float32) * scale + offset

    def scale_offset(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return ``scale`` and ``offset``, each (3, 1, 1) float32: input = pixel * scale + offset."""
        std = np.asarray(self.std, dtype=np.float64)
        scale = 1 / (255 * std)
        offset = -np.asarray(self.mean, dtype=np.float64) / std
        return scale.astype(np.float32)[:, None, None], offset.astype(np.float32)[:, None, None]


def _center_crop_box(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of torchvision's ``Resize(size)`` and ``CenterCrop(size)``, before the resize.

    Resizing only this box gives the same pixels, and never allocates the long side of a very long image.
    """
    shorter = min(width, height)
    scaled = (int(size * width / shorter), int(size * height / shorter))
    left, top = (round((side - size) / 2.0) for side in scaled)
    x_scale, y_scale = width / scaled[0], height / scaled[1]
    # Rounding may put the far edge slightly outside, which Pillow rejects.
    return left * x_scale, top * y_scale, min((left + size) * x_scale, width), min((top + size) * y_scale, height)
