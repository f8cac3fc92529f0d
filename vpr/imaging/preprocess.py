"""The one preprocessing that training, evaluation and deployment share."""

import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_LONG = 4  # largest ratio of the sides of an image that is resized before the crop
# Bounded, so that no card can produce an infinite or NaN input.
_Mean = Annotated[float, Field(ge=-10, le=10)]
_Std = Annotated[float, Field(ge=1e-3, le=10)]

ModelInput = NDArray[Any]  # a batch as `Preprocess.model_input` returns it: normalised float32, or uint8 pixels


class Preprocess(BaseModel):
    """Convert an image to the model's input, as recorded in an artifact's card.

    Attributes:
        size: Side of the square input, in pixels.
        resize: ``squash`` resizes to the square; ``shortest`` resizes the shorter side to ``size / crop_pct``.
        crop: ``none`` (with ``squash``) or ``center``.
        crop_pct: With ``shortest``, ``size`` as a share of the resized shorter side, as in timm.
        interpolation: Filter of the resize, antialiased.
        mean: Mean of each channel, for values in 0…1.
        std: Standard deviation of each channel, for values in 0…1.
        layout: Order of the axes of the model's input; a graph with uint8 input may have ``NHWC``.
        dtype: Data type of the model's input; a graph with ``uint8`` input normalises inside.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=16, le=2048)
    resize: Literal["squash", "shortest"] = "squash"
    crop: Literal["none", "center"] = "none"
    crop_pct: float = Field(default=1.0, ge=0.1, le=1)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[_Mean, _Mean, _Mean] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[_Std, _Std, _Std] = (0.26862954, 0.26130258, 0.27577711)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dtype: Literal["float32", "uint8"] = "float32"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of an image of the model's input."""
        return (3, self.size, self.size) if self.layout == "NCHW" else (self.size, self.size, 3)

    @property
    def float_input(self) -> "Preprocess":
        """The same preprocessing for a model that takes normalised float32; equal for models that read equal images."""
        return self.model_copy(update={"layout": "NCHW", "dtype": "float32"})

    def model_input(self, pixels: NDArray[np.uint8]) -> ModelInput:
        """Convert (batch, 3, size, size) uint8 to the model's input: normalised, or as it is in the model's layout."""
        values: ModelInput = self.normalise(pixels) if self.dtype == "float32" else pixels
        return values if self.layout == "NCHW" else np.ascontiguousarray(values.transpose(0, 2, 3, 1))

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop an RGB image to (3, size, size) uint8."""
        resampling = _RESAMPLING[self.interpolation]
        if self.resize == "squash":
            image = image.resize((self.size, self.size), resampling)
        else:
            image = _resize_and_crop(image, math.floor(self.size / self.crop_pct), self.size, resampling)
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


def _resize_and_crop(image: Image.Image, shorter: int, size: int, resampling: Image.Resampling) -> Image.Image:
    """Apply torchvision's ``Resize(shorter)`` and ``CenterCrop(size)``.

    Of a long image only the box of the crop is resized, to bound the memory. Its pixels differ by at most two grey
    levels, because Pillow rounds the edges of the box to float32.
    """
    width, height = image.size
    scaled = (int(shorter * width / min(width, height)), int(shorter * height / min(width, height)))
    left, top = (round((side - size) / 2.0) for side in scaled)
    if max(scaled) <= _LONG * shorter:
        return image.resize(scaled, resampling).crop((left, top, left + size, top + size))
    x_scale, y_scale = width / scaled[0], height / scaled[1]
    # Rounding may put the far edge slightly outside, which Pillow rejects.
    right, bottom = min((left + size) * x_scale, width), min((top + size) * y_scale, height)
    return image.resize((size, size), resampling, (left * x_scale, top * y_scale, right, bottom))
