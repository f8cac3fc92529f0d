"""Preprocessing pipelines that clients use, by their steps: those that agree with a card, and those that do not.

A client of a service often preprocesses with another library. Each value of a step is what a common library or a common
mistake does, written with Pillow and torch. Where a library is not used itself, its name is in the description with
"as": OpenCV's and torchvision's resize without antialiasing sample the same points as torch's.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpr.imaging.decode import Box, decode_bytes, make_upright, to_rgb
from vpr.imaging.preprocess import ModelInput, Preprocess

Pixels = NDArray[np.float32]  # (height, width, 3) float32 in 0…255

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}
# Modes of torch.nn.functional.interpolate, without antialiasing.
_ALIASED = {"bilinear-aliased": "bilinear", "bicubic-aliased": "bicubic", "nearest-corner": "nearest"}
_STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "none": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
}
_LONG = 4  # largest ratio of the sides of an image that is resized before a crop, which bounds the memory
_CROP_PCT = {"crop": 1.0, "crop-0.875": 0.875}
_PADDING = {"letterbox-black": 0.0, "letterbox-white": 255.0}
_QUALITY = 75  # of Pillow's and many upload services' JPEG encoders
_NO_CHANGE = "card"

# By step and value: what differs from the card. The order is that of the steps in the pipeline.
DEPARTURES: dict[str, dict[str, str]] = {
    "decoder": {
        "reduced": "JPEG decoded at the smallest scale that is large enough, as by Pillow's draft() or IMREAD_REDUCED",
        "recompressed": f"image compressed again as JPEG of quality {_QUALITY} before it is decoded",
    },
    "orientation": {"ignored": "EXIF orientation ignored, as by Image.open() or torchvision.io without a flag"},
    "transparency": {
        "black": "transparent pixels on black",
        "dropped": "alpha channel dropped, as by convert('RGB') or cv2.imread()",
    },
    "colour": {"bgr": "BGR instead of RGB, as by cv2.imread()", "grey": "grey instead of RGB"},
    "geometry": {
        "squash": "resized to a square without keeping the aspect ratio",
        "crop": "shorter side resized to the input, then a central crop",
        "crop-0.875": "shorter side resized to 8/7 of the input, then a central crop, as for ImageNet models",
        "letterbox-black": "aspect ratio kept by black borders",
        "letterbox-white": "aspect ratio kept by white borders",
    },
    "resize": {
        "bicubic": "bicubic filter, antialiased",
        "bilinear": "bilinear filter, antialiased",
        "lanczos": "Lanczos filter, antialiased",
        "box": "box filter, as INTER_AREA",
        "nearest": "nearest pixel, as by Pillow",
        "nearest-corner": "nearest pixel, as INTER_NEAREST",
        "bilinear-aliased": "bilinear without antialiasing, as INTER_LINEAR or torchvision's antialias=False",
        "bicubic-aliased": "bicubic without antialiasing, as INTER_CUBIC",
    },
    "normalisation": {
        "clip": "CLIP's mean and standard deviation",
        "imagenet": "ImageNet's mean and standard deviation",
        "half": "mean and standard deviation 0.5",
        "unit": "values in 0…1 without mean and standard deviation",
        "none": "values in 0…255 without normalisation",
    },
    "layout": {
        "reshaped": "NHWC values in a tensor of shape NCHW",
        "transposed": "height and width exchanged",
    },
}
# Values that give the embeddings of the card but for rounding.
_EQUIVALENT = {
    "decoder": {"full": "JPEG decoded at its full size"},
    "resize": {"tensor": "the card's filter on tensors, antialiased, as torchvision's antialias=True"},
}


@dataclass(frozen=True)
class Pipeline:
    """Steps from an image file to a model's input. ``card`` is what the card of the model says.

    Attributes:
        decoder: Decoding of the file. The card's decodes a JPEG at a scale of at least twice the input.
        orientation: Treatment of the EXIF orientation. The card's turns the image.
        transparency: Treatment of transparent pixels. The card's composites on white.
        colour: Order of the channels. The card's is RGB.
        geometry: Fit of the image into the square.
        resize: Filter.
        normalisation: Mean and standard deviation.
        layout: Order of the axes. The card's is NCHW.
    """

    decoder: str = _NO_CHANGE
    orientation: str = _NO_CHANGE
    transparency: str = _NO_CHANGE
    colour: str = _NO_CHANGE
    geometry: str = _NO_CHANGE
    resize: str = _NO_CHANGE
    normalisation: str = _NO_CHANGE
    layout: str = _NO_CHANGE

    @property
    def changes(self) -> dict[str, str]:
        """Values that are not the card's, by step."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {step: value for step, value in values.items() if value != _NO_CHANGE}

    @property
    def departures(self) -> dict[str, str]:
        """Changes that give other embeddings, by step."""
        return {step: value for step, value in self.changes.items() if value in DEPARTURES[step]}

    def apply(self, data: bytes, name: Path | str, preprocess: Preprocess, box: Box | None = None) -> Pixels:
        """Return the (3, size, size) float32 input of an image file; ``name`` and ``box`` are those of ``decode``.

        Raises:
            ImageRejected: The file is not an image, truncated, or too large.
        """
        return self.from_image(self.decode(data, name, preprocess.size, box), preprocess)

    def from_image(self, image: Image.Image, preprocess: Preprocess) -> Pixels:
        """Return the (3, size, size) float32 input of an RGB image that :meth:`decode` has returned."""
        pixels = self._fit(image, preprocess)
        if self.colour == "bgr":
            pixels = pixels[:, :, ::-1]
        mean, std = _STATISTICS.get(self.normalisation, (preprocess.mean, preprocess.std))
        # The sums of Preprocess.normalise, so that equal pixels give equal inputs.
        scale, offset = preprocess.model_copy(update={"mean": mean, "std": std}).scale_offset()
        values = pixels * scale[:, 0, 0] + offset[:, 0, 0]
        if self.layout == "reshaped":
            return np.ascontiguousarray(values).reshape(3, preprocess.size, preprocess.size)
        axes = (2, 1, 0) if self.layout == "transposed" else (2, 0, 1)
        return np.ascontiguousarray(values.transpose(axes))

    @property
    def decoding(self) -> Pipeline:
        """The same pipeline without the steps after :meth:`decode`."""
        colour = self.colour if self.colour == "grey" else _NO_CHANGE
        return Pipeline(self.decoder, self.orientation, self.transparency, colour)

    def decode(self, data: bytes, name: Path | str, size: int, box: Box | None = None) -> Image.Image:
        """Return a file as RGB, for an input of ``size`` pixels."""
        # The decoder keeps twice the side that it is given.
        shortest = {"full": None, "reduced": math.ceil(size / 2)}.get(self.decoder, size)
        image = decode_bytes(data, name, box, shortest, self._convert)
        if self.decoder == "recompressed":
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=_QUALITY)
            image = Image.open(stream)
        return image.convert("L").convert("RGB") if self.colour == "grey" else image

    def _convert(self, image: Image.Image) -> Image.Image:
        background = {"black": "black", "dropped": None}.get(self.transparency, "white")
        return to_rgb(image if self.orientation == "ignored" else make_upright(image), background)

    def _fit(self, image: Image.Image, preprocess: Preprocess) -> Pixels:
        """Resize and crop an RGB image to (size, size, 3)."""
        if self.geometry == self.resize == _NO_CHANGE:
            return preprocess.pixels(image).transpose(1, 2, 0).astype(np.float32)
        own = "squash" if preprocess.resize == "squash" else "crop"
        geometry = own if self.geometry == _NO_CHANGE else self.geometry
        resize = partial(_resize, image, self.resize, preprocess.interpolation)
        size, (width, height) = preprocess.size, image.size
        if geometry == "squash":
            return resize(size, size)
        if geometry in _PADDING:
            scale = size / max(width, height)
            fitted = resize(max(1, round(width * scale)), max(1, round(height * scale)))
            square = np.full((size, size, 3), _PADDING[geometry], dtype=np.float32)
            top, left = (round((size - side) / 2) for side in fitted.shape[:2])  # as ImageOps.pad
            square[top : top + fitted.shape[0], left : left + fitted.shape[1]] = fitted
            return square
        image = _shorten(image)
        width, height = image.size
        resize = partial(_resize, image, self.resize, preprocess.interpolation)
        crop_pct = preprocess.crop_pct if self.geometry == _NO_CHANGE else _CROP_PCT[geometry]
        shorter = math.floor(size / crop_pct)
        # Torchvision's rounding, as in Preprocess.
        scaled = resize(int(shorter * width / min(width, height)), int(shorter * height / min(width, height)))
        top, left = (round((side - size) / 2.0) for side in scaled.shape[:2])
        return scaled[top : top + size, left : left + size]


def equivalent_pipelines() -> list[Pipeline]:
    """Return the pipelines that agree with the card; the first one is the card's."""
    return [Pipeline(), Pipeline(decoder="full"), Pipeline(resize="tensor"), Pipeline(decoder="full", resize="tensor")]


def departures(preprocess: Preprocess, start: Pipeline | None = None) -> dict[str, Pipeline]:
    """Return the pipelines with one more changed step than ``start``, by the name ``step.value`` of the change.

    Changes to what the card says already are left out.
    """
    start = start or Pipeline()
    same = _values_of(preprocess)
    return {
        f"{step}.{value}": replace(start, **{step: value})
        for step, values in DEPARTURES.items()
        for value in values
        if step not in start.changes and value not in same.get(step, ())
    }


def client_pipelines(preprocess: Preprocess) -> dict[str, Pipeline]:
    """Return the known pipelines by name: the card's, those that agree with it, and the departures.

    All but the card's and other decoders decode at full size, as other libraries do.
    """
    agreeing = {"decoder.full": Pipeline(decoder="full"), "resize.tensor": Pipeline(decoder="full", resize="tensor")}
    full = {name: replace(pipeline, decoder="full") for name, pipeline in departures(preprocess).items()}
    decoders = {name: pipeline for name, pipeline in departures(preprocess).items() if name.startswith("decoder.")}
    return {_NO_CHANGE: Pipeline(), **agreeing, **full, **decoders}


def to_model_input(values: Pixels, preprocess: Preprocess) -> ModelInput:
    """Convert (batch, 3, size, size) float32 of pipelines to the model's input; to uint8 by the card's statistics."""
    if preprocess.dtype == "float32":
        return values
    scale, offset = preprocess.scale_offset()
    return preprocess.model_input(np.clip(np.rint((values - offset) / scale), 0, 255).astype(np.uint8))


def describe(step: str, value: str) -> str:
    """Return what a value of a step does."""
    return DEPARTURES[step].get(value) or _EQUIVALENT[step][value]


def _values_of(preprocess: Preprocess) -> dict[str, tuple[str, ...]]:
    """Return the values that are the card's own, by step."""
    crop = {0.875: "crop-0.875", 1.0: "crop"}.get(preprocess.crop_pct, "")
    statistics = (preprocess.mean, preprocess.std)
    return {
        "geometry": ("squash" if preprocess.resize == "squash" else crop,),
        "resize": (preprocess.interpolation,),
        # A model that takes uint8 normalises itself.
        "normalisation": tuple(
            name
            for name, values in _STATISTICS.items()
            if preprocess.dtype == "uint8" or np.allclose(values, statistics)
        ),
    }


def _shorten(image: Image.Image) -> Image.Image:
    """Return the central part of an image that is longer than :data:`_LONG` times its shorter side."""
    limit = _LONG * min(image.size)
    if max(image.size) <= limit:
        return image
    left, top = (max(0, side - limit) // 2 for side in image.size)
    return image.crop((left, top, min(image.width, left + limit), min(image.height, top + limit)))


def _resize(image: Image.Image, kernel: str, interpolation: str, width: int, height: int) -> Pixels:
    """Resize to (height, width, 3), in 8 bits as the libraries do."""
    if kernel in ("tensor", *_ALIASED):
        import torch
        import torch.nn.functional as F

        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        mode = _ALIASED.get(kernel, interpolation)
        align = None if mode == "nearest" else False
        resized = F.interpolate(pixels, (height, width), mode=mode, align_corners=align, antialias=kernel == "tensor")
        return resized[0].permute(1, 2, 0).numpy().astype(np.float32)
    resampling = _PILLOW[interpolation if kernel == _NO_CHANGE else kernel]
    return np.asarray(image.resize((width, height), resampling), dtype=np.float32)
