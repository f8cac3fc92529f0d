"""What an image's file may cost to read: bounds that are checked before Pillow parses or decodes it.

Pillow bounds the pixels it allocates. These bound what else a file can ask of it: parts that its parsers walk through
one by one in Python, scans that are decoded one over the other, directories that are unpacked whole.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

from PIL import Image

MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 100_000_000  # of a JPEG, which is decoded at a reduced scale; others may have a share of it
_SHARE = {"JPEG": 1, "MPO": 1, "WEBP": 4}  # half for all others; libwebp holds an image several times over
MAX_SIDE = 65_535
MAX_EXIF_BYTES = 1 << 20
_MOST_PARTS = 1 << 16  # chunks, segments, blocks
_MOST_ENTRIES = 300_000  # strips or tiles of a TIFF
_MOST_JUNK = 1 << 16  # bytes between segments
_MOST_EXIF_SEGMENTS = 16
_MOST_SCANNED = 20 * MAX_PIXELS  # pixels times scans
_MOST_COEFFICIENTS = 3 * MAX_PIXELS  # of several scans all are held, of two bytes each
_MOST_RUN_LENGTH = 4_000_000  # pixels, and bytes: Pillow decodes such a BMP in Python
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # but for stuffed bytes and restarts
_WITHOUT_LENGTH = b"\x01\xd8"
_START_OF_SCAN, _END, _EXIF = b"\xda", b"\xd9", b"\xe1"
_TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
_SIZED = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # types whose values Pillow unpacks


class DecodeLimitExceeded(Exception):
    """A file that asks for more than an image needs; the message says of what."""


def check_file(data: bytes) -> int:
    """Refuse a file whose parts alone would keep Pillow busy.

    Returns:
        the number of its scans, for :func:`check_image`; 1 for all but JPEGs.

    Raises:
        DecodeLimitExceeded: more parts than any real image has.
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
    """Refuse an opened image, not decoded yet, of too many pixels, or whose pixels cost too much.

    Args:
        image: as Pillow opened it.
        scans: from :func:`check_file`.
        size: of its file, bytes.

    Raises:
        DecodeLimitExceeded: saying of what.
    """
    pixels = image.width * image.height
    most = MAX_PIXELS // _SHARE.get(str(image.format), 2)
    if pixels > most:
        raise DecodeLimitExceeded(f"{image.width}x{image.height} pixels, more than {most}")
    if max(image.size) > MAX_SIDE:
        raise DecodeLimitExceeded(f"{image.width}x{image.height} pixels, a side of more than {MAX_SIDE}")
    if scans * pixels > _MOST_SCANNED:
        raise DecodeLimitExceeded(f"{scans} scans of {pixels} pixels")
    if scans > 1 and pixels * len(image.getbands()) > _MOST_COEFFICIENTS:
        raise DecodeLimitExceeded(f"{pixels} pixels of {len(image.getbands())} colours in several scans")
    tiles = getattr(image, "tile", [])
    if any(tile[0] == "bmp_rle" for tile in tiles) and max(pixels, size) > _MOST_RUN_LENGTH:
        raise DecodeLimitExceeded(f"a run-length coded BMP of more than {_MOST_RUN_LENGTH} pixels or bytes")
    if image.mode in ("I", "F"):
        raise DecodeLimitExceeded("numbers of 32 bits, which no screen shows")


def _check_segments(data: bytes) -> int:
    """Walk through a JPEG's segments up to its end; the number of its scans."""
    at = 2
    scans = exif = junk = 0
    for _ in range(_MOST_PARTS):
        found = _MARKER.search(data, at)
        if found is None or found[1] == _END:
            return scans
        if not scans:  # behind the first scan lies coded data
            junk += found.end() - at - 2
        exif += found[1] == _EXIF and data[found.end() + 2 : found.end() + 6] == b"Exif"
        scans += found[1] == _START_OF_SCAN
        at = found.end()
        if found[1] not in _WITHOUT_LENGTH:
            at += int.from_bytes(data[at : at + 2], "big")
        if junk > _MOST_JUNK:
            raise DecodeLimitExceeded(f"more than {_MOST_JUNK} bytes between its segments")
        if exif > _MOST_EXIF_SEGMENTS:
            raise DecodeLimitExceeded(f"more than {_MOST_EXIF_SEGMENTS} segments of EXIF")
    raise DecodeLimitExceeded(f"more than {_MOST_PARTS} segments")


def _check_chunks(data: bytes) -> None:
    at = 8
    for _ in range(_MOST_PARTS):
        if at >= len(data):
            return
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    raise DecodeLimitExceeded(f"more than {_MOST_PARTS} chunks")


def _check_blocks(data: bytes) -> None:
    """Walk through what lies before a GIF's first frame: extensions, each of blocks up to an empty one."""
    flags = data[10] if len(data) > 10 else 0
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    inside = False
    for _ in range(_MOST_PARTS):
        if at >= len(data) or (not inside and data[at] == ord(",")):
            return
        if inside:
            inside = data[at] != 0
            at += 1 + data[at]
        else:
            inside = data[at] == ord("!")
            at += 2 if inside else 1
    raise DecodeLimitExceeded(f"more than {_MOST_PARTS} blocks before its first frame")


def _check_directory(data: bytes) -> None:
    """Look at the numbers of values in a TIFF's first directory, which Pillow unpacks."""
    order, big = "<" if data[:1] == b"I" else ">", data[2] == ord("+")
    start, number, entry = ("Q", "Q", "HHQ8x") if big else ("I", "H", "HHI4x")
    try:
        (at,) = struct.unpack_from(order + start, data, 8 if big else 4)
        (entries,) = struct.unpack_from(order + number, data, at)
        if entries > _MOST_PARTS:
            raise DecodeLimitExceeded(f"{entries} entries in its directory")
        at += struct.calcsize(order + number)
        for _, kind, count in struct.iter_unpack(order + entry, data[at : at + entries * (20 if big else 12)]):
            if kind in _SIZED and count > _MOST_ENTRIES:
                raise DecodeLimitExceeded(f"{count} values of one entry in its directory")
    except struct.error:  # cut off: Pillow says so
        return


class DecodeBudget:
    """Pixels that may be decoded at once by all threads of a process; large images wait for each other.

    Args:
        pixels: in all.
        small: images of no more than this do not wait.
    """

    def __init__(self, pixels: int, small: int) -> None:
        self._free, self._small = pixels, small
        self._changed = Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for an image, and keep it."""
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
