from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from tests.reliability.hostile.images import chunk, directory, encoded
from vpr.imaging.decode import ImageRejected, decode, decode_bytes, read_header
from vpr.imaging.limits import MAX_FILE_BYTES, MAX_PIXELS
from vpr.imaging.preprocess import Preprocess


def _image(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_exif_orientation_equals_pillow(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(_image(60, 40), form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_bytes(data, "x")), np.asarray(expected))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_header_has_the_stored_and_the_upright_size(orientation: int, form: str) -> None:
    """Pillow turns a TIFF itself, and its size is upright before its pixels are read (Pillow#7381)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(_image(60, 40), form, exif=exif)
    header = read_header(data, "x")
    assert header == (60, 40, orientation)
    assert header.upright_size == decode_bytes(data, "x").size


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_invalid_exif_is_ignored(form: str) -> None:
    data = encoded(_image(60, 40), form, exif=b"<html>" * 9)
    assert decode_bytes(data, "x").size == (60, 40)
    assert decode_bytes(data, "x", box=(0, 0, 20, 10)).size == (20, 10)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_broken_image_is_rejected_with_and_without_box(form: str) -> None:
    """Reading the orientation of a box, which may follow the pixels, must not hide damaged pixels."""
    data = bytearray(encoded(_image(), form))
    for offset in range(len(data) // 3, len(data)):
        broken = bytes(data[:offset] + bytes([data[offset] ^ 0x40]) + data[offset + 1 :])
        results: list[bytes | None] = []
        for box in (None, (0, 0, 60, 40)):
            try:
                results.append(decode_bytes(broken, "x", box).tobytes())
            except ImageRejected:
                results.append(None)
        assert results[0] == results[1], offset


def test_box_uses_an_orientation_after_the_pixels() -> None:
    image = _image()
    exif = Image.Exif()
    exif[0x0112] = 6
    png = encoded(image, "PNG")
    block = b"eXIf" + exif.tobytes()[6:]
    data = png[:-12] + struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block)) + png[-12:]
    full = decode_bytes(data, "x")
    assert full.size == (40, 60)
    assert decode_bytes(data, "x", (3, 5, 20, 30)).tobytes() == full.crop((3, 5, 23, 35)).tobytes()


def test_out_of_memory_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ImageRejected, match="there is too little memory to decode it"):
        decode_bytes(encoded(_image(), "PNG"), "x")


def test_broken_exif_tag_is_ignored() -> None:
    # ResolutionUnit of a wrong type, as a camera writes it: Pillow can read the tags but not rewrite them.
    exif = Image.Exif()
    exif[0x0112], exif[0x0128] = 6, 2
    data = encoded(_image(60, 40), "JPEG", exif=exif)
    entry = data.index(struct.pack(">HHI", 0x0128, 3, 1))
    broken = data[:entry] + struct.pack(">HHI", 0x0128, 2, 1) + data[entry + 8 :]
    assert decode_bytes(broken, "x").size == (40, 60)


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
    length=st.floats(0.05, 1),
)
def test_any_damage_gives_an_image_or_an_image_error(form: str, changes: list[tuple[int, int]], length: float) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    data = bytearray(encoded(_image(20, 30), form, **({} if form in ("BMP", "GIF") else {"exif": exif})))
    for offset, value in changes:
        data[offset % len(data)] = value
    with contextlib.suppress(ImageRejected):
        Preprocess(size=16).pixels(decode_bytes(bytes(data[: int(length * len(data))]), "x", shortest=16))


def test_alpha_is_composited_on_white() -> None:
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert np.asarray(decode_bytes(encoded(transparent, "PNG"), "x")).min() == 255


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey16 = Image.fromarray(np.full((9, 9), 0x8000, dtype=np.uint16))
    image = grey16 if mode == "I;16" else _image(9, 9).convert(mode)
    decoded = decode_bytes(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), "x")
    assert (decoded.mode, decoded.size) == ("RGB", (9, 9))
    if mode == "I;16":
        assert np.unique(np.asarray(decoded)).tolist() == [128]


def _grey_tiff(bits: int, photometric: int, values: list[int]) -> bytes:
    """Return a TIFF of one row of an even number of grey values of 12 or 16 bits."""
    pairs = zip(values[::2], values[1::2], strict=True)
    pixels = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in pairs) if bits == 12 else struct.pack("<8H", *values)
    tags = {256: len(values), 257: 1, 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1, 278: 1, 279: len(pixels)}
    return directory([(tag, 4, 1, value) for tag, value in tags.items()], 200) + pixels


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_grey_of_a_tiff_is_scaled_to_8_bits(bits: int, photometric: int) -> None:
    """Pillow leaves 12 bits in the lower part of 16, and does not invert 16 bits whose zero is white (Pillow#4804)."""
    values = [round(share * (2**bits - 1) / 7) for share in range(8)]
    decoded = np.asarray(decode_bytes(_grey_tiff(bits, photometric, values), "x"), dtype=float)[0, :, 0]
    expected = np.linspace(0, 255, 8)
    np.testing.assert_allclose(decoded, expected if photometric else expected[::-1], atol=1)


@pytest.mark.parametrize(("bits", "colour", "value"), [(1, 0, 1), (2, 0, 1), (4, 0, 5), (8, 0, 7), (16, 2, 0x8000)])
def test_transparent_colour_of_any_depth_becomes_white(bits: int, colour: int, value: int) -> None:
    """The first row has the transparent colour of the file, the second row is black (Pillow#9281)."""
    sample = (
        value.to_bytes(2, "big") * 24 if bits == 16 else bytes([sum(value << at for at in range(0, 8, bits))]) * bits
    )
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 2, bits, colour, 0, 0, 0))
    transparent = chunk(b"tRNS", value.to_bytes(2, "big") * (3 if colour else 1))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + sample + b"\0" + bytes(len(sample))))
    data = b"\x89PNG\r\n\x1a\n" + head + transparent + pixels + chunk(b"IEND", b"")
    decoded = np.asarray(decode_bytes(data, "x"))
    assert [np.unique(row).tolist() for row in decoded] == [[255], [0]]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_first_frame_of_an_animation_is_read(form: str) -> None:
    frames = [Image.new("RGBA", (16, 16), (*colour, 255)) for colour in ((200, 30, 40), (0, 200, 0))]
    for frame in frames:
        frame.paste((0, 0, 0, 0), (0, 0, 8, 16))  # transparent, as in Pillow#6590
    decoded = np.asarray(
        decode_bytes(encoded(frames[0], form, save_all=True, append_images=frames[1:]), "x"), dtype=int
    )
    np.testing.assert_allclose(decoded[:, 2:6], 255, atol=4)
    np.testing.assert_allclose(decoded[:, 10:14], np.broadcast_to((200, 30, 40), (16, 4, 3)), atol=12)


def test_jpeg_is_decoded_at_twice_the_needed_size() -> None:
    data = encoded(_image(1200, 800), "JPEG")
    assert decode_bytes(data, "x", shortest=64).size == (300, 200)
    assert min(decode_bytes(data, "x", shortest=300).size) >= 600


def test_box_is_cropped_from_the_full_image() -> None:
    data = encoded(_image(), "PNG")
    crop = decode_bytes(data, "x", box=(10, 5, 20, 30), shortest=4)
    np.testing.assert_array_equal(np.asarray(crop), np.asarray(_image())[5:35, 10:30])
    with pytest.raises(ImageRejected, match="is outside the 60x40 image"):
        decode_bytes(data, "x", box=(100, 5, 20, 30))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_box_of_a_reduced_jpeg_equals_the_full_one(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(_image(1203, 805), "JPEG", quality=95, exif=exif)
    box = (101, 53, 610, 505)
    full, reduced = decode_bytes(data, "x", box), decode_bytes(data, "x", box, shortest=60)
    assert full.size == (610, 505)
    assert reduced.size == (153, 127)  # a quarter; an eighth would be less than twice the needed size
    first, second = (np.asarray(image.resize((60, 60)), dtype=float) for image in (full, reduced))
    moved = np.asarray(decode_bytes(data, "x", (109, 53, 610, 505)).resize((60, 60)), dtype=float)
    assert np.abs(first - second).mean() < 0.5 * np.abs(first - moved).mean()
    assert np.abs(first - second).mean() < 3.0


@given(
    size=st.tuples(st.integers(40, 900), st.integers(40, 900)),
    corner=st.tuples(st.floats(-50, 800), st.floats(-50, 800)),
    sides=st.tuples(st.floats(1, 900), st.floats(1, 900)),
    shortest=st.integers(1, 120),
)
@settings(max_examples=60, deadline=None)
def test_reduced_box_has_twice_the_needed_size(
    size: tuple[int, int], corner: tuple[float, float], sides: tuple[float, float], shortest: int
) -> None:
    data = encoded(Image.new("RGB", size), "JPEG")
    try:
        full = decode_bytes(data, "x", (*corner, *sides))
    except ImageRejected:
        return
    reduced = decode_bytes(data, "x", (*corner, *sides), shortest)
    assert reduced.size == full.size or min(reduced.size) >= 2 * shortest - 1  # both edges are rounded


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_rejected(form: str, tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    data = encoded(_image(300, 200), form)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageRejected, match=rf"{path}: truncated or broken image"):
        decode(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff\xd8\xff"])
def test_files_of_other_formats_are_rejected(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageRejected, match="Replace the file"):
        decode(path)


@pytest.mark.parametrize(
    ("side", "reason"), [(12_000, f"12000x12000 pixels, more than {MAX_PIXELS // 2}"), (60_000, "decompression bomb")]
)
def test_too_large_header_is_rejected_unallocated(side: int, reason: str) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ImageRejected, match=reason):
        decode_bytes(png, "bomb.png")


def test_missing_file_and_folder_are_rejected(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jpg", tmp_path):
        with pytest.raises(ImageRejected, match=str(path)):
            decode(path)


def test_pipe_is_rejected_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageRejected, match=r"pipe\.jpg: not a file"):
        decode(tmp_path / "pipe.jpg")


def test_huge_file_is_rejected_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ImageRejected, match=f"more than {MAX_FILE_BYTES}"):
        decode(tmp_path / "huge.jpg")


def test_missing_image_names_the_command_that_relocates_a_catalogue(tmp_path: Path) -> None:
    with pytest.raises(ImageRejected, match=r"If the images moved: vpr catalog relocate --catalog C --root NEW\."):
        decode(tmp_path / "missing.jpg")
