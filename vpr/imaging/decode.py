"""Decoding of image files to RGB, with bounded memory."""

import errno
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, JpegImagePlugin, TiffImagePlugin, WebPImagePlugin

from vpr.common.errors import OUT_OF_MEMORY, UserError
from vpr.imaging import limits
from vpr.imaging.formats import HEIC_UNREADABLE, can_read_heic, formats_of, is_heic
from vpr.imaging.limits import MAX_FILE_BYTES, DecodeBudget, DecodeLimitExceeded

_MEMBER = re.compile(r"(.*?\.tar)#(\d{1,15})\+(\d{1,15})/.+", re.DOTALL)

# EXIF 2.3, tag 0x0112: the transpose that makes the stored image upright.
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

_SWAPS_SIDES = (5, 6, 7, 8)
_BUDGET = DecodeBudget(limits.MAX_PIXELS, small=4_000_000)
_STRIP_PIXELS = 4_000_000  # composited on white at a time
_GREY_LEVELS = {"L;2": 4, "L;4": 16}  # of a grey PNG with fewer than 8 bits, by Pillow's name
_WHITE_IS_ZERO = 0  # PhotometricInterpretation of a TIFF

Box = tuple[float, float, float, float]
Edges = tuple[int, int, int, int]


class Header(NamedTuple):
    """Size of an image as it is stored, in pixels, and its EXIF orientation, 1 to 8."""

    width: int
    height: int
    orientation: int

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height of the upright image, in pixels."""
        is_turned = self.orientation in _SWAPS_SIDES
        return (self.height, self.width) if is_turned else (self.width, self.height)


class ImageRejected(UserError):
    """File that is not a usable image; ``reason`` says why."""

    def __init__(self, path: Path | str, reason: str) -> None:
        fix = "Replace the file, or build the catalogue with --skip-unreadable"
        if reason == os.strerror(errno.ENOENT):
            fix = "If the images moved: vpr catalog relocate --catalog C --root NEW"
        super().__init__(f"{path}: {reason}. {fix}.")
        self.reason = reason


def decode(path: Path | str, box: Box | None = None, shortest: int | None = None) -> Image.Image:
    """Decode a file of one of :data:`vpr.imaging.formats.FORMATS`, or HEIC, to RGB with bounded memory.

    ``box`` is a crop (x, y, width, height) in pixels of the upright image, applied after decoding. ``shortest`` is the
    shortest side that the caller needs, in pixels. JPEGs are then decoded at a reduced scale at which the image, or the
    crop, is still at least twice as large. A JPEG of more than 100 megapixels is decoded at half
    its size or less, to at most 50 megapixels.

    Raises:
        ImageRejected: The file is not an image, truncated, or too large.
    """
    return decode_bytes(read_image(Path(path)), path, box, shortest)


def read_image(path: Path) -> bytes:
    """Read the bytes of a file, or of ``SHARD.tar#OFFSET+SIZE/MEMBER`` in a shard (:mod:`vpr.data.webdataset`).

    Raises:
        ImageRejected: The file is missing, too large or not a regular file.
    """
    member = _MEMBER.fullmatch(str(path))
    file, offset = (Path(member[1]), int(member[2])) if member else (path, 0)
    try:
        # Opening a pipe could block forever, and a device may have no end.
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
        raise ImageRejected(path, "its file ends before the image does")
    return data


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a stored image as upright RGB: turned by its EXIF orientation, transparent pixels on white."""
    return to_rgb(make_upright(image))


def decode_bytes(
    data: bytes,
    name: Path | str,
    box: Box | None = None,
    shortest: int | None = None,
    convert: Callable[[Image.Image], Image.Image] = upright_rgb,
) -> Image.Image:
    """Decode bytes like :func:`decode`; ``name`` names them in errors.

    ``convert`` maps the stored image to the result, before the crop. Only comparisons with other pipelines change it.
    """
    with _errors(data, name):
        image, scans = _open(data)
        pixels = image.width * image.height
        edges, scale = None, 1.0
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            edges = _crop_edges(image, box, name)
            scale = _draft_jpeg(image, edges, shortest)
        if image.width * image.height > limits.MAX_PIXELS:  # the budget would never have so many
            raise DecodeLimitExceeded(f"{image.width}x{image.height} pixels, more than {limits.MAX_PIXELS}")
        # libjpeg keeps all coefficients of an image with several scans, whatever the scale.
        with _BUDGET.hold(pixels if scans > 1 else image.width * image.height):
            image.load()
            edges = edges or _crop_edges(image, box, name)  # a PNG may store its orientation after the pixels
            image = convert(image)
    if edges is None:
        return image
    left, top, right, bottom = (round(edge / scale) for edge in edges)
    return image.crop((left, top, right, bottom))


def read_header(data: bytes, name: Path | str) -> Header:
    """Read the stored size and the orientation of an image; ``name`` names it in errors.

    Raises:
        ImageRejected: The bytes are not an image, or it is too large.
    """
    with _errors(data, name):
        image, _ = _open(data)
        # The size that Pillow gives a TIFF is that of the upright image already (python-pillow/Pillow#7383).
        tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
        size = (tags.get(TiffImagePlugin.IMAGEWIDTH, image.width), tags.get(TiffImagePlugin.IMAGELENGTH, image.height))
        # A PNG may store its orientation after the pixels, which are then decoded.
        with _BUDGET.hold(image.width * image.height if image.format == "PNG" else 0):
            return Header(*size, _read_orientation(image))


def _open(data: bytes) -> tuple[Image.Image, int]:
    """Open an image whose cost is within the limits; return its number of scans too."""
    with warnings.catch_warnings():
        # Pillow only warns above its limit; check_image checks the header before any allocation.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        scans = limits.check_file(data)
        try:
            image = Image.open(io.BytesIO(data), formats=formats_of(data[:32]))
        except Image.DecompressionBombError:
            if data[:3] != b"\xff\xd8\xff":
                raise
            # Of more than Pillow's 178 megapixels. Here it is decoded at a reduced size.
            image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        limits.check_image(image, scans, len(data))
        _scale_transparency(image)
        _keep_canvas(image)
        return image, scans


def _keep_canvas(image: Image.Image) -> None:
    """Keep the transparency of an animated WebP whose frames are opaque but smaller than its canvas.

    Pillow drops it, so that the rest of the canvas is black.
    """
    if isinstance(image, WebPImagePlugin.WebPImageFile) and image.is_animated and image.rawmode == "RGBX":
        image.rawmode = image._mode = "RGBA"


def _scale_transparency(image: Image.Image) -> None:
    """Scale the transparent colour of a PNG to 8 bits per channel. Pillow scales only the pixels."""
    tiles, colour = getattr(image, "tile", []), image.info.get("transparency")
    depth = tiles[0][3] if image.format == "PNG" and tiles else ""
    if depth in _GREY_LEVELS and isinstance(colour, int):
        levels = _GREY_LEVELS[depth]
        image.info["transparency"] = colour % levels * 255 // (levels - 1)
    elif depth == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


@contextmanager
def _errors(data: bytes, name: Path | str) -> Iterator[None]:
    """Raise all errors of reading an image as :class:`ImageRejected`."""
    try:
        yield
    except ImageRejected:
        raise
    except DecodeLimitExceeded as error:
        raise ImageRejected(name, str(error)) from None
    except Image.UnidentifiedImageError:
        reason = HEIC_UNREADABLE if is_heic(data[:32]) and not can_read_heic() else "not an image"
        raise ImageRejected(name, reason) from None
    except MemoryError:
        raise ImageRejected(name, f"{OUT_OF_MEMORY} to decode it") from None
    except Exception as error:  # Pillow's parsers raise many types on broken files
        raise ImageRejected(name, f"truncated or broken image ({error})") from None


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 if the block is missing, broken, or larger than any camera writes."""
    if len(image.info.get("exif") or b"") > limits.MAX_EXIF_BYTES:
        return 1
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow's parser raises many types on broken blocks
        return 1


def make_upright(image: Image.Image) -> Image.Image:
    """Turn or mirror an image by its EXIF orientation."""
    # Not ImageOps.exif_transpose: it rewrites the other tags, so one broken tag would lose a good image.
    transpose = _TRANSPOSES.get(_read_orientation(image))
    return image if transpose is None else image.transpose(transpose)


def to_rgb(image: Image.Image, background: str | None = "white") -> Image.Image:
    """Convert an image to RGB on a background colour; None drops the transparency."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        tags = getattr(image, "tag_v2", {})  # of a TIFF; Pillow neither scales 12 bits nor inverts 16
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        grey = (values >> bits - 8).astype(np.uint8)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
            grey = 255 - grey
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if background and ("A" in image.getbands() or "transparency" in image.info):
        return _composite(image, background)
    return image.convert("RGB")


def _composite(image: Image.Image, background: str) -> Image.Image:
    """Composite on a colour, as shops do on white; in strips, since each step copies four bytes per pixel."""
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        plain = Image.new("RGBA", strip.size, background)
        result.paste(Image.alpha_composite(plain, strip).convert("RGB"), (0, top))
    return result


def _crop_edges(image: Image.Image, box: Box | None, name: Path | str) -> Edges | None:
    """Clip a box to an image that is not upright yet: (left, top, right, bottom) in the upright image."""
    if box is None:
        return None
    x, y, w, h = box
    is_turned = _read_orientation(image) in _SWAPS_SIDES
    width, height = (image.height, image.width) if is_turned else image.size
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(width, round(x + w)), min(height, round(y + h))
    if right <= left or bottom <= top:
        raise ImageRejected(name, f"box {box} is outside the {width}x{height} image")
    return left, top, right, bottom


def _draft_jpeg(image: Image.Image, edges: Edges | None, shortest: int | None) -> float:
    """Set a reduced decoding scale that leaves twice ``shortest``; return the factor of the reduction.

    An image of more than ``MAX_PIXELS`` is reduced in any case, see :func:`vpr.imaging.limits.reduction`.
    """
    width, height = image.size
    needed = (2 * shortest, 2 * shortest) if shortest else image.size
    if edges is not None and shortest:
        ratio = 2 * shortest / min(edges[2] - edges[0], edges[3] - edges[1])
        needed = (math.ceil(width * ratio), math.ceil(height * ratio))
    if (factor := limits.reduction(width * height)) > 1:
        needed = (min(needed[0], width // factor), min(needed[1], height // factor))
    if needed == image.size:
        return 1.0
    drafted = image.draft("RGB", needed)
    # The exact factor: the last row and column of the reduced image may cover fewer pixels.
    return width / drafted[1][2] if drafted else 1.0
