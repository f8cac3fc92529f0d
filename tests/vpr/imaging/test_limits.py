"""Small files that are expensive to open; each limit was set from the measured cost of such a file."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from PIL import Image

from tests.reliability.hostile.images import (
    blank_png,
    chunk,
    directory,
    encoded,
    many_scans,
    promised_jpeg,
    promised_webp,
    run_length_bmp,
    segment,
    with_exif,
)
from vpr.imaging import limits
from vpr.imaging.decode import ImageRejected, decode_bytes
from vpr.imaging.limits import MAX_PIXELS, MAX_SIDE, DecodeBudget

_SMALL = Image.new("RGB", (64, 64), (9, 90, 200))


def _insert(form: str, mark: bytes, extra: bytes) -> bytes:
    """Return a valid image with extra bytes before the first mark."""
    data = encoded(_SMALL.convert("L") if form == "GIF" else _SMALL, form)
    offset = data.index(mark)
    return data[:offset] + extra + data[offset:]


def _jpeg(extra: bytes) -> bytes:
    return _insert("JPEG", b"\xff\xe0", extra)


def _png(extra: bytes) -> bytes:
    data = encoded(_SMALL, "PNG")
    offset = data.index(b"IDAT") - 4  # the chunk's length precedes its name
    return data[:offset] + extra + data[offset:]


_STRIPS = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 400_000, 200), (279, 4, 1, 64)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_jpeg(segment(0xFE, b"") * 70_000), "more than 65536 segments"),
        (_jpeg(b"\xff" * 70_000), "more than 65536 bytes between its segments"),
        (_jpeg(segment(0xFE, b"") + bytes(70_000)), "more than 65536 bytes between its segments"),
        (with_exif(bytes(2_000_000)), "more than 16 segments of EXIF"),
        (_png(chunk(b"abCd", b"") * 70_000), "more than 65536 chunks"),
        (_insert("GIF", b",\0\0\0\0@\0@\0", b"!\xfe\x01a\0" * 40_000), "more than 65536 blocks before its first frame"),
        (_insert("GIF", b",\0\0\0\0@\0@\0", bytes(70_000)), "more than 65536 blocks before its first frame"),
        (directory(_STRIPS, 1_600_200), "400000 values of one entry in its directory"),
        (run_length_bmp(3000, 1400, b"\x01\x01\0\0" * 1400 + b"\0\1"), "a run-length coded BMP of more than 4000000"),
        (run_length_bmp(8, 8, b"\x00\x03\x01" * 1_400_000), "a run-length coded BMP of more than 4000000"),
        (many_scans(2048, 600), "scans of 4194304 pixels"),
        (blank_png(7072, 7072, 1, 0), f"7072x7072 pixels, more than {MAX_PIXELS // 2}"),
        (promised_webp("RGB", 5001), f"5001x5001 pixels, more than {MAX_PIXELS // 4}"),
        (promised_jpeg("CMYK", 9000, {"progressive": True}), "81000000 pixels of 4 colours in several scans"),
        (blank_png(1, MAX_SIDE + 1, 1, 0), f"1x65536 pixels, a side of more than {MAX_SIDE}"),
        (encoded(Image.new("I", (9, 9), 70_000), "TIFF"), "32-bit pixels"),
        (encoded(Image.new("F", (9, 9), 0.5), "TIFF"), "32-bit pixels"),
    ],
)
def test_expensive_files_are_rejected(data: bytes, reason: str) -> None:
    with pytest.raises(ImageRejected, match=reason):
        decode_bytes(data, "x")


@pytest.mark.parametrize(
    "data",
    [
        _jpeg(segment(0xFE, b"\xff\xda\xff\xd9" * 100) * 200),
        _jpeg(b"\xff" * 100),
        _jpeg(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 3),
        _png(chunk(b"tEXt", b"a\0b") * 1000),
        _insert("GIF", b",\0\0\0\0@\0@\0", b"!\xfe" + (b"\xff" + bytes(255)) * 200 + b"\0"),
        encoded(_SMALL, "TIFF", compression="tiff_lzw"),
        encoded(_SMALL, "JPEG", progressive=True),
    ],
)
def test_unusual_files_are_read(data: bytes) -> None:
    decoded = np.asarray(decode_bytes(data, "x"), dtype=int)
    expected = np.asarray(_SMALL.convert("L").convert("RGB") if data[:3] == b"GIF" else _SMALL, dtype=int)
    assert np.abs(decoded - expected).max() <= 4


@pytest.mark.parametrize("filler", [b"\xff", b"\xff\x00", b"\xff\xd0"], ids=["runs", "stuffed bytes", "restarts"])
def test_long_fillers_take_linear_time(filler: bytes) -> None:
    def seconds(length: int) -> float:
        data = _jpeg(b"")[:-2] + filler * length  # after the coded data, without an end
        start = time.process_time()
        limits.check_file(data)
        return time.process_time() - start

    # Quadratic time would take minutes; 0.5 s for a megabyte is far above the cost of a linear search.
    assert seconds(1_000_000) < 0.5


def test_compositing_in_strips_equals_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpr.imaging.decode._STRIP_PIXELS", 100)
    rgba = np.random.default_rng(0).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    decoded = np.asarray(decode_bytes(encoded(Image.fromarray(rgba), "PNG"), "x"), dtype=float)
    alpha = rgba[..., 3:] / 255
    assert np.abs(decoded - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_transparent_16_bit_grey_becomes_white() -> None:
    transparent = blank_png(4, 4, 16, 0, chunk(b"tRNS", b"\0\0"))
    assert np.unique(np.asarray(decode_bytes(transparent, "x"))).tolist() == [255]
    opaque = blank_png(4, 4, 16, 0, chunk(b"tRNS", b"\0\1"))
    assert np.unique(np.asarray(decode_bytes(opaque, "x"))).tolist() == [0]


def test_cmyk_is_converted_as_by_pillow() -> None:
    inks = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    image = Image.fromarray(inks, "CMYK")
    np.testing.assert_array_equal(
        np.asarray(decode_bytes(encoded(image, "TIFF"), "x")), np.asarray(image.convert("RGB"))
    )


def test_only_large_images_wait_for_each_other() -> None:
    budget, peak, held, lock = DecodeBudget(100, small=10), 0, 0, threading.Lock()

    def decode() -> None:
        nonlocal peak, held
        with budget.hold(40):
            with lock:
                held += 40
                peak = max(peak, held)
            time.sleep(0.01)
            with lock:
                held -= 40

    threads = [threading.Thread(target=decode) for _ in range(8)]
    with budget.hold(100), budget.hold(10):  # the second is small and does not wait
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        assert held == 0
    for thread in threads:
        thread.join()
    assert peak == 80
