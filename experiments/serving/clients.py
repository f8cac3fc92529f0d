"""Clients of a model, written as its users write them: with Pillow, numpy and torchvision, without this toolkit.

The right client follows the README of ``vpr export serving``, for a model that squashes images to its size, bicubic.
Each wrong one has one line of common code instead. They share no code with :mod:`vpr.imaging.pipelines`, so that
naming their mistake is a test of it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from vpr.imaging.preprocess import Preprocess

Input = NDArray[np.float32]  # (3, size, size) float32
_BICUBIC, _BILINEAR = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def open_upright(data: bytes, size: int) -> Image.Image:
    """Open an image file and turn it by its EXIF orientation."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def open_as_stored(data: bytes, size: int) -> Image.Image:
    """Open an image file."""
    return Image.open(io.BytesIO(data))


def open_reduced(data: bytes, size: int) -> Image.Image:
    """Open an image file, a JPEG at the smallest scale that is large enough."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (size, size))
    return ImageOps.exif_transpose(image)


def open_recompressed(data: bytes, size: int) -> Image.Image:
    """Open an image file that an upload service has compressed again."""
    stream = io.BytesIO()
    on_white(open_upright(data, size)).save(stream, "JPEG")
    return Image.open(stream)


def on_white(image: Image.Image) -> Image.Image:
    """Return RGB on white."""
    return _on("white", image)


def on_black(image: Image.Image) -> Image.Image:
    """Return RGB on black."""
    return _on("black", image)


def _on(colour: str, image: Image.Image) -> Image.Image:
    if "A" not in image.getbands():
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image.convert("RGBA")).convert("RGB")


def resized(filter: Image.Resampling) -> Callable[[Image.Image, int], Image.Image]:
    """Return Pillow's resize to a square."""
    return lambda image, size: image.resize((size, size), filter)


def by_tensor(mode: v2.InterpolationMode, antialias: bool) -> Callable[[Image.Image, int], Image.Image]:
    """Return torchvision's resize of a tensor to a square."""
    return lambda image, size: to_pil_image(v2.Resize([size, size], mode, antialias=antialias)(pil_to_tensor(image)))


def by_corner(image: Image.Image, size: int) -> Image.Image:
    """Take the pixel at the rounded-down position, as OpenCV's INTER_NEAREST."""
    pixels = np.asarray(image)
    rows, columns = (np.arange(size) * side // size for side in pixels.shape[:2])
    return Image.fromarray(pixels[rows][:, columns])


def cropped(crop_pct: float) -> Callable[[Image.Image, int], Image.Image]:
    """Return torchvision's resize of the shorter side and its central crop."""
    return lambda image, size: v2.Compose([v2.Resize(int(size / crop_pct), _BICUBIC), v2.CenterCrop(size)])(image)


def padded(colour: str) -> Callable[[Image.Image, int], Image.Image]:
    """Return Pillow's resize that keeps the aspect ratio by borders."""
    return lambda image, size: ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, colour)


@dataclass(frozen=True)
class Client:
    """Steps of a client: open a file, make it RGB, fit it to the size, read, normalise and arrange its values."""

    load: Callable[[bytes, int], Image.Image] = open_upright
    to_rgb: Callable[[Image.Image], Image.Image] = on_white
    fit: Callable[[Image.Image, int], Image.Image] = resized(Image.Resampling.BICUBIC)
    read: Callable[[Image.Image], NDArray[np.uint8]] = np.asarray
    statistics: tuple[list[float], list[float]] | None = None  # mean and standard deviation; None is the card's
    unit: float = 255  # pixel value of 1
    arrange: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda values: values.transpose(2, 0, 1)

    def input(self, data: bytes, preprocess: Preprocess) -> Input:
        """Return the model's input of an image file."""
        image = self.fit(self.to_rgb(self.load(data, preprocess.size)), preprocess.size)
        mean, std = self.statistics or (preprocess.mean, preprocess.std)
        return np.ascontiguousarray(self.arrange((self.read(image) / self.unit - mean) / std), dtype=np.float32)


TEN_LINES = Client()
TENSORS = Client(fit=by_tensor(_BICUBIC, antialias=True))

# Wrong clients by what they do, with the departures that have to be named.
WRONG: Mapping[str, tuple[Client, dict[str, str]]] = {
    "reads with OpenCV (BGR)": (
        replace(TEN_LINES, read=lambda image: np.asarray(image)[:, :, ::-1]),
        {"colour": "bgr"},
    ),
    "converts to grey": (
        replace(TEN_LINES, to_rgb=lambda image: on_white(image).convert("L").convert("RGB")),
        {"colour": "grey"},
    ),
    "ignores the EXIF orientation": (replace(TEN_LINES, load=open_as_stored), {"orientation": "ignored"}),
    "drops the alpha channel": (
        replace(TEN_LINES, to_rgb=lambda image: image.convert("RGB")),
        {"transparency": "dropped"},
    ),
    "composites on black": (replace(TEN_LINES, to_rgb=on_black), {"transparency": "black"}),
    "decodes JPEGs at a reduced scale": (replace(TEN_LINES, load=open_reduced), {"decoder": "reduced"}),
    "compresses uploads again": (replace(TEN_LINES, load=open_recompressed), {"decoder": "recompressed"}),
    "resizes bilinear": (replace(TEN_LINES, fit=resized(Image.Resampling.BILINEAR)), {"resize": "bilinear"}),
    "resizes by Lanczos": (replace(TEN_LINES, fit=resized(Image.Resampling.LANCZOS)), {"resize": "lanczos"}),
    "resizes by the nearest pixel": (replace(TEN_LINES, fit=resized(Image.Resampling.NEAREST)), {"resize": "nearest"}),
    "resizes as INTER_NEAREST": (replace(TEN_LINES, fit=by_corner), {"resize": "nearest-corner"}),
    "resizes tensors bilinear without antialiasing": (
        replace(TEN_LINES, fit=by_tensor(_BILINEAR, antialias=False)),
        {"resize": "bilinear-aliased"},
    ),
    "resizes tensors bicubic without antialiasing": (
        replace(TEN_LINES, fit=by_tensor(_BICUBIC, antialias=False)),
        {"resize": "bicubic-aliased"},
    ),
    "crops the centre": (replace(TEN_LINES, fit=cropped(1.0)), {"geometry": "crop"}),
    "crops as for ImageNet": (replace(TEN_LINES, fit=cropped(0.875)), {"geometry": "crop-0.875"}),
    "pads with black": (replace(TEN_LINES, fit=padded("black")), {"geometry": "letterbox-black"}),
    "pads with white": (replace(TEN_LINES, fit=padded("white")), {"geometry": "letterbox-white"}),
    "normalises as for ImageNet": (replace(TEN_LINES, statistics=_IMAGENET), {"normalisation": "imagenet"}),
    "normalises to -1…1": (replace(TEN_LINES, statistics=([0.5] * 3, [0.5] * 3)), {"normalisation": "half"}),
    "scales to 0…1 only": (replace(TEN_LINES, statistics=([0.0] * 3, [1.0] * 3)), {"normalisation": "unit"}),
    "passes 0…255": (replace(TEN_LINES, statistics=([0.0] * 3, [1.0] * 3), unit=1), {"normalisation": "none"}),
    "reshapes NHWC to NCHW": (
        replace(TEN_LINES, arrange=lambda values: values.reshape(3, *values.shape[:2])),
        {"layout": "reshaped"},
    ),
    "exchanges height and width": (
        replace(TEN_LINES, arrange=lambda values: values.transpose(2, 1, 0)),
        {"layout": "transposed"},
    ),
}
# Clients with several mistakes.
COMBINED: Mapping[str, tuple[Client, dict[str, str]]] = {
    "OpenCV without any conversion": (
        replace(
            TEN_LINES,
            load=open_as_stored,
            to_rgb=lambda image: image.convert("RGB"),
            fit=by_tensor(_BILINEAR, antialias=False),
            read=lambda image: np.asarray(image)[:, :, ::-1],
        ),
        {"orientation": "ignored", "transparency": "dropped", "colour": "bgr", "resize": "bilinear-aliased"},
    ),
    "an ImageNet pipeline": (
        replace(TEN_LINES, fit=cropped(0.875), statistics=_IMAGENET),
        {"geometry": "crop-0.875", "normalisation": "imagenet"},
    ),
}
