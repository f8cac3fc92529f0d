"""Preprocessing in Triton's Python backend: image files to the model's input, by the parameters of ``config.pbtxt``.

``vpr export serving --accept-images`` copies this file as ``model.py``, so it imports numpy and Pillow only. Its pixels
are those of ``vpr.imaging``. It rejects large images, but not every costly file that ``vpr.imaging.limits`` knows:
limit the size of requests in front of Triton.
"""

import io
import json
import math
import warnings
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

MAX_BYTES = 64 << 20
MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_LONG = 4  # largest ratio of the sides of an image that is resized before the crop
_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TritonPythonModel:
    """Model with the input ``image``, (batch, 1) files as bytes, and one output, the model's input."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the preprocessing from the model's parameters."""
        config = json.loads(args["model_config"])
        entries = ((name.partition("."), entry["string_value"]) for name, entry in config["parameters"].items())
        values = {key: value for (group, _, key), value in entries if group == "preprocess"}
        self.output = config["output"][0]["name"]
        self.size, self.crop_pct = int(values["size"]), float(values["crop_pct"])
        self.is_squashed, self.filter = values["resize"] == "squash", _FILTERS[values["interpolation"]]
        self.is_float = values["dtype"] == "float32"
        self.axes = (2, 0, 1) if values["layout"] == "NCHW" else (0, 1, 2)
        mean, std = (np.asarray(json.loads(values[key]), dtype=np.float64) for key in ("mean", "std"))
        self.scale, self.offset = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; one with a file that is not an image gets an error."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        files = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
        try:
            rows = [self.preprocess(bytes(data)) for data in files]
        except Exception as error:  # Pillow's parsers raise many types on broken files
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"image: cannot be read ({error})"))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(self.output, np.stack(rows))])

    def preprocess(self, data: bytes) -> NDArray[Any]:
        """Return the input of an image file: (3, size, size), or (size, size, 3) for a model that takes NHWC."""
        values: NDArray[Any] = np.asarray(self._fit(self._decode(data)))
        if self.is_float:  # a model that takes uint8 normalises inside
            values = values.astype(np.float32) * self.scale + self.offset
        return np.ascontiguousarray(values.transpose(self.axes))

    def _decode(self, data: bytes) -> Image.Image:
        """Decode to upright RGB on white; a JPEG at a scale of at least twice the input."""
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data)} bytes, more than {MAX_BYTES}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
        if isinstance(image, JpegImagePlugin.JpegImageFile) and image.size != (2 * self.size, 2 * self.size):
            image.draft("RGB", (2 * self.size, 2 * self.size))
        image.load()
        return _to_rgb(_make_upright(image))

    def _fit(self, image: Image.Image) -> Image.Image:
        """Resize, and crop the centre, as torchvision's ``Resize`` and ``CenterCrop`` do."""
        size = self.size
        if self.is_squashed:
            return image.resize((size, size), self.filter)
        (width, height), shorter = image.size, math.floor(size / self.crop_pct)
        scaled = (int(shorter * width / min(width, height)), int(shorter * height / min(width, height)))
        left, top = (round((side - size) / 2.0) for side in scaled)
        if max(scaled) <= _LONG * shorter:
            return image.resize(scaled, self.filter).crop((left, top, left + size, top + size))
        # Of a long image only the box of the crop is resized, to bound the memory.
        x, y = width / scaled[0], height / scaled[1]
        box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
        return image.resize((size, size), self.filter, box)


def _make_upright(image: Image.Image) -> Image.Image:
    try:
        transpose = _TRANSPOSES.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block says nothing
        transpose = None
    return image if transpose is None else image.transpose(transpose)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")
