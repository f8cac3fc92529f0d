"""Limits on the cost of reading an image file, checked before Pillow parses or decodes it.

Pillow limits only the pixels that it allocates. These limits cover other costs: parts that its parsers visit one by
one in Python, progressive scans that are decoded repeatedly, and TIFF directories that are unpacked at once.
"""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

from PIL import Image

MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 100_000_000  # that are decoded
MAX_JPEG_PIXELS = 1_000_000_000  # of a JPEG with one scan, which is decoded at a reduced size
_MAX_REDUCED_PIXELS = 50_000_000  # that such a JPEG is decoded to
_REDUCTIONS = (2, 4, 8)  # of libjpeg
# Of MAX_PIXELS; libwebp and libavif allocate several copies of an image. A HEIC of 48 megapixels takes 400 MB.
_PIXEL_DIVISORS = {"JPEG": 1, "MPO": 1, "WEBP": 4, "AVIF": 4}
_DEFAULT_PIXEL_DIVISOR = 2
MAX_SIDE = 65_535
MAX_EXIF_BYTES = 1 << 20
_MAX_PARTS = 1 << 16  # chunks, segments, blocks
_MAX_TIFF_VALUES = 300_000  # strips or tiles
_MAX_JUNK = 1 << 16  # bytes between segments
_MAX_EXIF_SEGMENTS = 16
_MAX_SCANNED = 20 * MAX_PIXELS  # pixels times scans
_MAX_COEFFICIENTS = 3 * MAX_PIXELS  # of two bytes; libjpeg keeps all of them for several scans
_MAX_RUN_LENGTH = 4_000_000  # pixels, and bytes: Pillow decodes a run-length coded BMP in Python
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # all but stuffed bytes and restarts; linear in runs of ff
_WITHOUT_LENGTH = b"\x01\xd8"
_START_OF_SCAN, _END, _EXIF = b"\xda", b"\xd9", b"\xe1"
_TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
_UNPACKED_TYPES = frozenset({3, 4, 5, 8, 9, 10, 11, 12, 13, 16})  # TIFF types whose values Pillow unpacks


class DecodeLimitExceeded(Exception):
    """File that exceeds a limit; the message names it."""


def check_file(data: bytes) -> int:
    """Check the number of parts that Pillow's parsers would visit.

    Returns a JPEG's number of scans, for :func:`check_image`; 1 for other formats.

    Raises:
        DecodeLimitExceeded: The file has more parts than any real image.
    """
    if data[:3] == b"\xff\xd8\xff":
        return _check_segments(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        _check_chunks(data)
    elif data[:4] == b"GIF8":
        _check_blocks(data)
    elif data[:4] in _TIFF:
        _check_directory(data)
    return 1


def check_image(image: Image.Image, scans: int, size: int) -> None:
    """Check the number of pixels of an opened image, and the cost of decoding them.

    ``scans`` comes from :func:`check_file`, ``size`` is the size of the file in bytes.

    Raises:
        DecodeLimitExceeded: The image exceeds a limit.
    """
    pixels = image.width * image.height
    limit = MAX_PIXELS // _PIXEL_DIVISORS.get(str(image.format), _DEFAULT_PIXEL_DIVISOR)
    if limit == MAX_PIXELS and scans == 1 and image.mode in ("RGB", "L"):
        limit = MAX_JPEG_PIXELS
    if pixels > limit:
        raise DecodeLimitExceeded(f"{image.width}x{image.height} pixels, more than {limit}")
    if max(image.size) > MAX_SIDE:
        raise DecodeLimitExceeded(f"{image.width}x{image.height} pixels, a side of more than {MAX_SIDE}")
    if scans * pixels > _MAX_SCANNED:
        raise DecodeLimitExceeded(f"{scans} scans of {pixels} pixels")
    if scans > 1 and pixels * len(image.getbands()) > _MAX_COEFFICIENTS:
        raise DecodeLimitExceeded(f"{pixels} pixels of {len(image.getbands())} colours in several scans")
    tiles = getattr(image, "tile", [])
    if any(tile[0] == "bmp_rle" for tile in tiles) and max(pixels, size) > _MAX_RUN_LENGTH:
        raise DecodeLimitExceeded(f"a run-length coded BMP of more than {_MAX_RUN_LENGTH} pixels or bytes")
    if image.mode in ("I", "F"):
        raise DecodeLimitExceeded("32-bit pixels, which are not supported")


def reduction(pixels: int) -> int:
    """Return the factor by which both sides of a JPEG of this many pixels are reduced at least."""
    if pixels <= MAX_PIXELS:
        return 1
    return next(factor for factor in _REDUCTIONS if pixels <= _MAX_REDUCED_PIXELS * factor**2)


def _check_segments(data: bytes) -> int:
    """Check a JPEG's segments; return its number of scans."""
    offset = 2
    scans = exif = junk = 0
    for _ in range(_MAX_PARTS):
        match = _MARKER.search(data, offset)
        if match is None or match[1] == _END:
            return scans
        if not scans:  # coded data follows the first scan's header
            junk += match.end() - offset - 2
        exif += match[1] == _EXIF and data[match.end() + 2 : match.end() + 6] == b"Exif"
        scans += match[1] == _START_OF_SCAN
        offset = match.end()
        if match[1] not in _WITHOUT_LENGTH:
            offset += int.from_bytes(data[offset : offset + 2], "big")
        if junk > _MAX_JUNK:
            raise DecodeLimitExceeded(f"more than {_MAX_JUNK} bytes between its segments")
        if exif > _MAX_EXIF_SEGMENTS:
            raise DecodeLimitExceeded(f"more than {_MAX_EXIF_SEGMENTS} segments of EXIF")
    raise DecodeLimitExceeded(f"more than {_MAX_PARTS} segments")


def _check_chunks(data: bytes) -> None:
    offset = 8
    for _ in range(_MAX_PARTS):
        if offset >= len(data):
            return
        offset += 12 + int.from_bytes(data[offset : offset + 4], "big")
    raise DecodeLimitExceeded(f"more than {_MAX_PARTS} chunks")


def _check_blocks(data: bytes) -> None:
    """Check the extensions before a GIF's first frame; an empty block ends each of them."""
    flags = data[10] if len(data) > 10 else 0
    offset = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    in_extension = False
    for _ in range(_MAX_PARTS):
        if offset >= len(data) or (not in_extension and data[offset] == ord(",")):
            return
        if in_extension:
            in_extension = data[offset] != 0
            offset += 1 + data[offset]
        else:
            in_extension = data[offset] == ord("!")
            offset += 2 if in_extension else 1
    raise DecodeLimitExceeded(f"more than {_MAX_PARTS} blocks before its first frame")


def _check_directory(data: bytes) -> None:
    """Check how many values Pillow would unpack from a TIFF's first directory."""
    order, is_big_tiff = "<" if data[:1] == b"I" else ">", data[2] == ord("+")
    start, number, entry = ("Q", "Q", "HHQ8x") if is_big_tiff else ("I", "H", "HHI4x")
    try:
        (offset,) = struct.unpack_from(order + start, data, 8 if is_big_tiff else 4)
        (entries,) = struct.unpack_from(order + number, data, offset)
        if entries > _MAX_PARTS:
            raise DecodeLimitExceeded(f"{entries} entries in its directory")
        offset += struct.calcsize(order + number)
        for _, dtype, count in struct.iter_unpack(
            order + entry, data[offset : offset + entries * (20 if is_big_tiff else 12)]
        ):
            if dtype in _UNPACKED_TYPES and count > _MAX_TIFF_VALUES:
                raise DecodeLimitExceeded(f"{count} values of one entry in its directory")
    except struct.error:  # truncated, which Pillow reports
        return


class DecodeBudget:
    """Limit of the pixels that all threads of a process decode at a time; large images wait for each other.

    ``pixels`` limits all large images together; an image of up to ``small`` pixels never waits.
    """

    def __init__(self, pixels: int, small: int) -> None:
        self._free, self._small = pixels, small
        self._changed = Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Reserve the pixels of an image; wait until they are free."""
        if pixels <= self._small:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
