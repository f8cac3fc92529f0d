"""Decoding images and the one preprocessing that training, evaluation and deployment share."""

from __future__ import annotations

import io
import math
import re
import warnings
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin
from pydantic import BaseModel, ConfigDict, Field

from vpr.common.errors import OUT_OF_MEMORY, UserError
from vpr.imaging.limits import (
    MAX_EXIF_BYTES,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    DecodeBudget,
    DecodeLimitExceeded,
    check_file,
    check_image,
)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_MEMBER = re.compile(r"(.*?\.tar)#(\d{1,15})\+(\d{1,15})/.+", re.DOTALL)
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# EXIF 2.3, tag 0x0112: what makes the stored image upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_ON_ITS_SIDE = (5, 6, 7, 8)
_ROOM = DecodeBudget(MAX_PIXELS, small=4_000_000)
_STRIP = 4_000_000  # pixels that are laid on white at a time

Box = tuple[float, float, float, float]
Edges = tuple[int, int, int, int]


class ImageRejected(UserError):
    """A file that is not a usable image; the message names it and says why."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}: replace the file, or make the catalogue with --skip-unreadable")
        self.reason = reason


# Bounded, so that no card can make an input that is not finite.
_Mean = Annotated[float, Field(ge=-10, le=10)]
_Std = Annotated[float, Field(ge=1e-3, le=10)]


class Preprocess(BaseModel):
    """From an image to the model's input, as recorded in an artifact's card.

    Attributes:
        size: side of the square input, pixels.
        resize: ``squash`` to the square, or the ``shortest`` side to ``size``.
        crop: ``none`` (squash) or ``center``.
        interpolation: filter of the resize, antialiased.
        mean: per channel, of values in 0…1.
        std: per channel, of values in 0…1.
        layout: order of the axes of a batch.
        dtype: of the model's input.
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
        resampling = _RESAMPLING[self.interpolation]
        if self.resize == "squash":
            image = image.resize((self.size, self.size), resampling)
        else:
            image = image.resize((self.size, self.size), resampling, _centre_box(image.width, image.height, self.size))
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(batch, 3, size, size) uint8 to normalised float32 of the same shape."""
        scale, offset = self.scale_offset()
        return pixels.astype(np.float32) * scale + offset

    def scale_offset(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """``scale`` and ``offset``, each (3, 1, 1) float32: input = pixel * scale + offset."""
        std = np.asarray(self.std, dtype=np.float64)
        scale = 1 / (255 * std)
        offset = -np.asarray(self.mean, dtype=np.float64) / std
        return scale.astype(np.float32)[:, None, None], offset.astype(np.float32)[:, None, None]


def _centre_box(width: int, height: int, size: int) -> Box:
    """(left, top, right, bottom) whose resize to a square is torchvision's ``Resize(size)`` and ``CenterCrop(size)``.

    Resizing only this box gives the same pixels without ever making the long side of a very long image.
    """
    shorter = min(width, height)
    scaled = (int(size * width / shorter), int(size * height / shorter))
    left, top = (round((side - size) / 2.0) for side in scaled)
    across, down = width / scaled[0], height / scaled[1]
    # Rounding may put the far edge a hair outside, which Pillow refuses.
    return left * across, top * down, min((left + size) * across, width), min((top + size) * down, height)


def decode(path: Path | str, box: Box | None = None, shortest: int | None = None) -> Image.Image:
    """Decode a file to RGB with bounded memory.

    Args:
        path: file of one of :data:`FORMATS`.
        box: (x, y, width, height) in pixels of the upright image, cut out after decoding.
        shortest: the smallest side that will be needed: JPEGs are then decoded at a reduced scale at which
            the image, or what the box cuts out, is still at least twice this.

    Raises:
        ImageRejected: not an image, truncated, or too large.
    """
    return decode_bytes(read_image(Path(path)), path, box, shortest)


def read_image(path: Path) -> bytes:
    """The bytes of an image's file; :class:`ImageRejected` if it is missing, too large or no plain file.

    ``SHARD.tar#OFFSET+SIZE/MEMBER`` is an image in a shard (:mod:`vpr.data.webdataset`).
    """
    member = _MEMBER.fullmatch(str(path))
    file, offset = (Path(member[1]), int(member[2])) if member else (path, 0)
    try:
        # Opening a pipe would wait for ever, a device might never end.
        if file.exists() and not file.is_file():
            raise ImageRejected(path, "not a file")
        size = int(member[3]) if member else file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ImageRejected(path, f"{size} bytes, more than {MAX_FILE_BYTES}")
        with file.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
    except (OSError, OverflowError) as error:
        raise ImageRejected(path, getattr(error, "strerror", None) or "cannot be read") from None
    if len(data) < size:
        raise ImageRejected(path, "its file ends before it does")
    return data


def decode_bytes(data: bytes, name: Path | str, box: Box | None = None, shortest: int | None = None) -> Image.Image:
    """As :func:`decode`, from bytes; ``name`` is used in errors."""
    try:
        with warnings.catch_warnings():
            # Pillow warns above its own limit; ours is checked from the header, before any allocation.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            scans = check_file(data)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            check_image(image, scans, len(data))
            pixels = image.width * image.height
            edges, scale = None, 1.0
            if isinstance(image, JpegImagePlugin.JpegImageFile):
                edges = _edges(image, box, name)
                scale = _reduce(image, edges, shortest) if shortest else 1.0
            # Of several scans the coefficients are kept whole, whatever the scale.
            with _ROOM.hold(pixels if scans > 1 else image.width * image.height):
                image.load()
                edges = edges or _edges(image, box, name)  # the orientation of a PNG may stand behind its pixels
                image = _upright(image)
                image = _to_rgb(image)
    except ImageRejected:
        raise
    except DecodeLimitExceeded as error:
        raise ImageRejected(name, str(error)) from None
    except Image.UnidentifiedImageError:
        raise ImageRejected(name, "not an image") from None
    except MemoryError:
        raise ImageRejected(name, f"{OUT_OF_MEMORY} to decode it") from None
    except Exception as error:  # Pillow raises whatever a broken file makes of its parsers
        raise ImageRejected(name, f"truncated or broken image ({error})") from None
    return image if edges is None else _cut(image, edges, scale)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 where there is none, where its block is broken, or larger than any camera writes."""
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
        return 1
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises whatever a broken block makes of its parser
        return 1


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the other tags anew, and one broken tag would lose a good image.
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        deep = np.asarray(image)
        grey = (deep >> 8).astype(np.uint8)
        if isinstance(clear := image.info.get("transparency"), int):
            grey[deep == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Shop cut-outs are meant to lie on white; in strips, since each step makes a copy of four bytes a pixel."""
    shown = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        shown.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return shown


def _edges(image: Image.Image, box: Box | None, name: Path | str) -> Edges | None:
    """What of a box lies in an image that is not turned yet: left, top, right, bottom when it is upright."""
    if box is None:
        return None
    x, y, w, h = box
    turned = _orientation(image) in _ON_ITS_SIDE
    width, height = (image.height, image.width) if turned else image.size
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(width, round(x + w)), min(height, round(y + h))
    if right <= left or bottom <= top:
        raise ImageRejected(name, f"box {box} lies outside the {width}x{height} image")
    return left, top, right, bottom


def _reduce(image: Image.Image, edges: Edges | None, shortest: int) -> float:
    """Have a JPEG decoded at a reduced scale that leaves twice ``shortest``; by what it is divided."""
    width, height = image.size
    needed = (2 * shortest, 2 * shortest)
    if edges is not None:
        share = 2 * shortest / min(edges[2] - edges[0], edges[3] - edges[1])
        needed = (math.ceil(width * share), math.ceil(height * share))
    drafted = image.draft("RGB", needed)
    # Each pixel stands for a whole square of the full image; its last row and column may be cut short.
    return width / drafted[1][2] if drafted else 1.0


def _cut(image: Image.Image, edges: Edges, scale: float) -> Image.Image:
    left, top, right, bottom = (round(edge / scale) for edge in edges)
    return image.crop((left, top, right, bottom))
