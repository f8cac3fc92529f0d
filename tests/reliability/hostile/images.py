"""Hostile images: decompression bombs, broken metadata, rare modes, other files under an image's name. No I/O.

Each is created from a few parameters. Unusual but valid images must be accepted, all others rejected.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image

_MIB = 1 << 20
_SOI, _COMMENT, _EXIF = b"\xff\xd8", 0xFE, 0xE1
_ORIENTATION = 0x0112
_GREY = 77


@dataclass(frozen=True)
class HostileImage:
    """A file under an image's name.

    Attributes:
        kind: Kind of the attack; the table of results has a row for each.
        name: Name of the attack.
        expected: Outcome.
        make: Function that returns the bytes. Together the files take hundreds of megabytes, so each is created late.
    """

    kind: str
    name: str
    expected: Literal["accepted", "rejected"]
    make: Callable[[], bytes]


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """Return an image in a file format."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def blank_png(width: int, height: int, bits: int, colour: int, before: bytes = b"") -> bytes:
    """Return a PNG of zeros, of any size in a few bytes; ``before`` are chunks ahead of its pixels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    left = ((width * bits * channels + 7) // 8 + 1) * height
    deflate, parts, block = zlib.compressobj(9), [], bytes(_MIB)
    while left > 0:
        parts.append(deflate.compress(block[: min(left, _MIB)]))
        left -= _MIB
    parts.append(deflate.flush())
    palette = chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + palette + before + chunk(b"IDAT", b"".join(parts)) + chunk(b"IEND", b"")


def run_length_bmp(width: int, height: int, body: bytes) -> bytes:
    """Return an 8-bit BMP with run-length coded pixels."""
    offset = 14 + 40 + 1024
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + head + bytes(1024) + body


def directory(entries: list[tuple[int, int, int, int]], size: int = 0) -> bytes:
    """Return a little-endian TIFF of one directory of (tag, type, count, value), padded with zeros."""
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return (head + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)).ljust(size, b"\0")


def segment(marker: int, data: bytes) -> bytes:
    """Return a segment of a JPEG."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def with_exif(block: bytes) -> bytes:
    """Return a small JPEG with an EXIF block, in as many segments as it needs."""
    parts = [
        segment(_EXIF, b"Exif\0\0" + block[offset : offset + 65_000]) for offset in range(0, max(len(block), 1), 65_000)
    ]
    return _after_start(b"".join(parts))


def many_scans(side: int, scans: int) -> bytes:
    """Return a progressive JPEG that repeats its last scan, empty, many times."""
    data = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True, quality=1, subsampling=0)
    offset = data.rindex(b"\xff\xda")
    head = data[offset : offset + 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")]
    return data[:offset] + head * scans + data[offset:]


def _solid(mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new(mode, size, {"1": 1, "F": 0.5}.get(mode, (_GREY,) * len(Image.new(mode, (1, 1)).getbands())))


def _after_start(data: bytes) -> bytes:
    jpeg = encoded(_solid(), "JPEG")
    return _SOI + data + jpeg[2:]


def _before_pixels(data: bytes) -> bytes:
    png = encoded(_solid(), "PNG")
    offset = png.index(b"IDAT") - 4
    return png[:offset] + data + png[offset:]


def _before_frame(data: bytes) -> bytes:
    gif = encoded(_solid("L"), "GIF")
    offset = gif.index(b",\0\0\0\0@\0@\0")
    return gif[:offset] + data + gif[offset:]


def _frames(form: str, size: tuple[int, int], count: int, mode: str = "RGB") -> bytes:
    frames = [
        Image.new(mode, size, (index % 256,) * len(mode) if mode != "P" else index % 256) for index in range(count)
    ]
    options: dict[str, Any] = {"lossless": True, "quality": 0, "method": 0} if form == "WEBP" else {}
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)


def _bombs() -> Iterator[HostileImage]:
    """Yield images with too many pixels, and with as many as are just allowed."""
    colours = {(8, 2): "RGB", (8, 6): "RGBA", (16, 6): "RGBA of 16 bits", (16, 0): "grey of 16 bits", (8, 3): "palette"}
    colours |= {(1, 0): "black and white", (8, 4): "grey with alpha"}
    for (bits, colour), label in colours.items():
        for side, expected in ((7071, "accepted"), (7072, "rejected"), (13_000, "rejected"), (30_000, "rejected")):
            make = (
                partial(blank_png, side, side, bits, colour)
                if side < 13_000
                else partial(promised_png, side, bits, colour)
            )
            yield HostileImage("bomb: PNG", f"{side}x{side} {label}", expected, make)  # type: ignore[arg-type]
    for mode in ("RGB", "L", "CMYK"):
        for progressive in (False, True):
            label = f"{mode}{', progressive' if progressive else ''}"
            options = {"progressive": progressive, "quality": 1, "subsampling": 0}
            at_limit = "rejected" if mode == "CMYK" and progressive else "accepted"
            sides = {10_000: at_limit, 10_001: "rejected", 16_000: "rejected"}
            if mode != "CMYK" and not progressive:  # decoded at a reduced size, up to a billion pixels
                sides = {10_000: "accepted", 16_000: "accepted", 31_623: "rejected"}
            for side, expected in sides.items():
                large = partial(_large, "JPEG", mode, side, options)
                make = large if side < 16_000 else partial(promised_jpeg, mode, side, options)
                yield HostileImage("bomb: JPEG", f"{side}x{side} {label}", expected, make)  # type: ignore[arg-type]
    for scans in (1000, 20_000):
        yield HostileImage(
            "bomb: JPEG", f"{scans} scans of 100 million pixels", "rejected", partial(many_scans, 10_000, scans)
        )
        yield HostileImage(
            "bomb: JPEG", f"{scans} scans of 9 million pixels", "rejected", partial(many_scans, 3000, scans)
        )
    for mode in ("RGB", "RGBA"):
        for lossless in (True, False):
            label = f"{mode}, {'lossless' if lossless else 'lossy'}"
            options = {"quality": 0, "method": 0}
            for side, expected in ((5000, "accepted"), (5001, "rejected"), (16_383, "rejected")):
                if side < 10_000 or lossless:
                    make = (
                        partial(promised_webp, mode, side) if lossless else partial(_large, "WEBP", mode, side, options)
                    )
                    yield HostileImage("bomb: WebP", f"{side}x{side} {label}", expected, make)  # type: ignore[arg-type]
    for mode in ("RGBA", "CMYK", "LA"):
        make = partial(_large, "TIFF", mode, 7071, {"compression": "tiff_deflate"})
        yield HostileImage("bomb: TIFF", f"7071x7071 {mode}, deflated", "accepted", make)
    for form, mode in (("WEBP", "RGBA"), ("WEBP", "RGB"), ("GIF", "P"), ("PNG", "RGBA")):
        max_side = 5000 if form == "WEBP" else 7071
        for side, expected in ((max_side, "accepted"), (max_side + 1, "rejected")):
            make = partial(_frames, form, (side, side), 2, mode)
            yield HostileImage("bomb: frames", f"2 frames of {side}x{side} {mode}, {form}", expected, make)  # type: ignore[arg-type]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        yield HostileImage("bomb: frames", f"1000 frames, {form}", "accepted", partial(_frames, form, (8, 8), 1000))


def _parts() -> Iterator[HostileImage]:
    """Yield files with millions of parts, which a decoder reads one by one."""
    strips = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    for count in (400_000, 15_000_000):
        entries = [*strips, (273, 4, count, 200), (278, 4, 1, 1), (279, 4, 1, 64)]
        make = partial(directory, sorted(entries), 200 + 4 * count)
        yield HostileImage("bomb: parts", f"TIFF of {count} strips", "rejected", make)
    makes: dict[str, Callable[[], bytes]] = {
        "15 million segments, JPEG": lambda: _after_start(b"\xff\xfe\x00\x02" * 15_000_000),
        "60 MB of fill before a segment, JPEG": lambda: _after_start(b"\xff" * 60_000_000),
        "60 MB of zeros before a segment, JPEG": lambda: _after_start(segment(_COMMENT, b"") + bytes(60_000_000)),
        "60 MB of EXIF, JPEG": lambda: with_exif(directory([(40_000, 1, 60_000_000, 0)], 60_000_000)),
        "5 million unknown chunks, PNG": lambda: _before_pixels(chunk(b"abCd", b"") * 5_000_000),
        "5 million chunks after the pixels, PNG": lambda: (
            encoded(_solid(), "PNG")[:-12] + chunk(b"abCd", b"") * 5_000_000
        ),
        "5 million texts, PNG": lambda: _before_pixels(chunk(b"tEXt", b"a\0") * 4_500_000),
        "5 million empty pieces of pixels, PNG": lambda: _before_pixels(chunk(b"IDAT", b"") * 5_000_000),
        "12 million comments, GIF": lambda: _before_frame(b"!\xfe\x01a\0" * 12_000_000),
        "60 MB of zeros before the frame, GIF": lambda: _before_frame(bytes(60_000_000)),
        "60 MB of comment, GIF": lambda: _before_frame(b"!\xfe" + (b"\xff" + bytes(255)) * 235_000 + b"\0"),
        "lines that end at once, BMP": lambda: run_length_bmp(65_535, 1500, b"\x01\x01\0\0" * 1500 + b"\0\1"),
        "runs of one pixel, BMP": lambda: run_length_bmp(8000, 4000, b"\x01\x01" * 32_000_000),
        "runs of no pixels, BMP": lambda: run_length_bmp(16, 16, b"\0\3\1" * 20_000_000),
    }
    yield from (HostileImage("bomb: parts", name, "rejected", make) for name, make in makes.items())
    text = zlib.compress(bytes(100 * _MIB), 9)
    yield HostileImage(
        "bomb: parts",
        "text of 100 MB, deflated, PNG",
        "rejected",
        lambda: _before_pixels(chunk(b"zTXt", b"a\0\0" + text)),
    )
    yield HostileImage(
        "bomb: parts",
        "colour profile of 100 MB, PNG",
        "rejected",
        lambda: _before_pixels(chunk(b"iCCP", b"a\0\0" + text)),
    )


def _broken_exif() -> Iterator[HostileImage]:
    """Yield valid images with broken metadata, which must still be accepted."""
    blocks: dict[str, bytes] = {
        "empty": b"",
        "zeros": bytes(64),
        "cut in its head": b"II*\0\x08",
        "text": b"<html>" * 9,
    }
    for value in (0, 9, 255, 65_535):
        blocks[f"orientation {value}"] = directory([(_ORIENTATION, 3, 1, value)])
    for kind in (2, 5, 7, 12, 13, 99):
        blocks[f"orientation of type {kind}"] = directory([(_ORIENTATION, kind, 1, 6)], 64)
    for count in (0, 2, 1000, 2**31, 2**32 - 1):
        blocks[f"orientation of {count} values"] = directory([(_ORIENTATION, 3, count, 26)], 4096)
    for offset in (0, 7, 60_000, 2**32 - 1):
        blocks[f"directory at {offset}"] = b"II*\0" + struct.pack("<I", offset) + bytes(32)
    blocks["directory of 65535 entries"] = b"II*\0" + struct.pack("<IH", 8, 65_535) + bytes(60)
    blocks["recursive directory"] = directory([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8)])
    blocks["5000 entries of 60 KB each"] = directory([(40_000 + n, 1, 60_000, 0) for n in range(5000)], 64_900)
    blocks["ratios over zero"] = directory([(0x011A, 5, 1, 26), (0x011B, 5, 1, 26)], 64)
    for label, block in blocks.items():
        yield HostileImage("EXIF", f"{label}, JPEG", "accepted", partial(with_exif, block))
    for form, put in (("PNG", _png_exif), ("WebP", _webp_exif)):
        name = f"orientation of 7 million values, {form}"
        yield HostileImage("EXIF", name, "accepted", partial(_with_large_exif, put))
    for label in ("directory of 65535 entries", "orientation of 2147483648 values", "text"):
        yield HostileImage("EXIF", f"{label}, PNG", "accepted", partial(_png_exif, blocks[label]))
        yield HostileImage("EXIF", f"{label}, WebP", "accepted", partial(_webp_exif, blocks[label]))


def _modes() -> Iterator[HostileImage]:
    """Yield images of rare modes."""
    deep = Image.fromarray(np.full((64, 64), _GREY * 257, np.uint16))
    forms: dict[str, tuple[str, ...]] = {
        "JPEG": ("L", "CMYK"),
        "TIFF": ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB"),
        "PNG": ("1", "L", "LA", "P", "RGBA"),
        "WEBP": ("RGBA",),
        "GIF": ("1", "L", "P"),
        "BMP": ("1", "L", "P"),
    }
    for form, modes in forms.items():
        for mode in modes:
            yield HostileImage("mode", f"{mode}, {form}", "accepted", partial(encoded, _solid(mode), form))
    for form in ("PNG", "TIFF"):
        yield HostileImage("mode", f"grey of 16 bits, {form}", "accepted", partial(encoded, deep, form))
    yield HostileImage("mode", "RGBA of 16 bits, PNG", "accepted", partial(blank_png, 64, 64, 16, 6))
    for colour, layout in ((0, "H"), (2, "HHH")):
        make = partial(blank_png, 64, 64, 16, colour, chunk(b"tRNS", struct.pack(f">{layout}", *[0] * len(layout))))
        yield HostileImage("mode", f"one transparent colour of 16 bits, PNG {colour}", "accepted", make)
    for mode in ("I", "F"):
        yield HostileImage("mode", f"{mode} of 32 bits, TIFF", "rejected", partial(encoded, _solid(mode), "TIFF"))
    for form in ("GIF", "WEBP", "PNG"):
        yield HostileImage("mode", f"animated, {form}", "accepted", partial(_frames, form, (64, 64), 5))


def _sizes() -> Iterator[HostileImage]:
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        yield HostileImage("size", f"1x1, {form}", "accepted", partial(encoded, _solid(size=(1, 1)), form))
        for size in ((1, 20_000), (20_000, 1)):
            if form != "WEBP":
                name = f"{size[0]}x{size[1]}, {form}"
                yield HostileImage("size", name, "accepted", partial(encoded, _solid(size=size), form))
    for width, height in ((1, 65_536), (1, 50_000_000), (50_000_000, 1)):
        yield HostileImage("size", f"{width}x{height}, PNG", "rejected", partial(blank_png, width, height, 8, 0))
    for width, height in ((0, 1), (1, 0), (2**31, 1), (2**32 - 1, 2**32 - 1)):
        yield HostileImage(
            "size", f"{width}x{height} in the head, PNG", "rejected", partial(promised_png, width, 8, 2, height)
        )


def _others() -> Iterator[HostileImage]:
    """Yield files of other formats, and truncated images."""
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/><script>alert(1)</script></svg>'
    files = {
        "SVG": svg,
        "SVG with a prologue": b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + svg,
        "HTML": b"<!doctype html><script>alert(1)</script>",
        "an empty file": b"",
        "a zip with a path outside": _zip("../../escaped.jpg"),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        "PDF": b"%PDF-1.7\n1 0 obj << /OpenAction << /S /JavaScript >> >> endobj",
        "ICO": encoded(_solid(), "ICO"),
        "PPM": encoded(_solid(), "PPM"),
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch escaped'\ntR.",
        "a shell script": b"#!/bin/sh\ntouch escaped\n",
    }
    for name, data in files.items():
        yield HostileImage("not an image", f"{name} named .jpg", "rejected", partial(bytes, data))
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encoded(_solid(size=(300, 200)), form)
        for share in (4, 2):
            yield HostileImage(
                "not an image", f"1/{share} of a {form}", "rejected", partial(bytes, data[: len(data) // share])
            )


def promised_webp(mode: str, side: int) -> bytes:
    """Return a WebP of one colour with a changed size in its header: its few codes are valid for any size."""
    data = bytearray(encoded(_solid(mode, (8, 8)), "WEBP", lossless=True))
    offset = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[offset : offset + 4], "little")
    data[offset : offset + 4] = (bits >> 28 << 28 | side - 1 << 14 | side - 1).to_bytes(4, "little")
    return bytes(data)


def promised_jpeg(mode: str, side: int, options: dict[str, Any]) -> bytes:
    """Return a small JPEG with another size in its header: to encode a large one takes gigabytes."""
    data = bytearray(_large("JPEG", mode, 64, options))
    offset = data.index(b"\xff\xc2" if options["progressive"] else b"\xff\xc0") + 5
    data[offset : offset + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def _large(form: str, mode: str, side: int, options: dict[str, Any]) -> bytes:
    return encoded(Image.new(mode, (side, side)), form, **options)


def promised_png(width: int, bits: int, colour: int, height: int | None = None) -> bytes:
    """Return a PNG with a size in its header, and no pixels."""
    head = struct.pack(">IIBBBBB", width, width if height is None else height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _with_large_exif(put: Callable[[bytes], bytes]) -> bytes:
    return put(directory([(_ORIENTATION, 3, 7_000_000, 26)], 14_000_100))


def _png_exif(block: bytes) -> bytes:
    return _before_pixels(chunk(b"eXIf", block))


def _webp_exif(block: bytes) -> bytes:
    return encoded(_solid(), "WEBP", exif=block)


def _zip(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, encoded(_solid(), "PNG"))
    return stream.getvalue()


def images() -> list[HostileImage]:
    """Return all hostile images; the names are distinct."""
    return [*_bombs(), *_parts(), *_broken_exif(), *_modes(), *_sizes(), *_others()]
