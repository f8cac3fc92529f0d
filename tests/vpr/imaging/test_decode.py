from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from pydantic import ValidationError
from torchvision.transforms import v2

from tests.reliability.hostile.images import encoded
from vpr.imaging.decode import ImageRejected, decode, decode_bytes
from vpr.imaging.limits import MAX_FILE_BYTES, MAX_PIXELS
from vpr.imaging.preprocess import Preprocess


def _image(width: int = 60, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (224, 224), (33, 200), (333, 77), (101, 100)])
def test_shortest_and_centre_equal_torchvision(size: tuple[int, int]) -> None:
    image = _image(*size)
    ours = Preprocess(size=32, resize="shortest", crop="center")
    theirs = v2.Compose([v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32), v2.PILToTensor()])
    difference = np.abs(ours.pixels(image).astype(int) - theirs(image).numpy().astype(int))
    assert difference.max() <= 1  # one grey level: the same filter, its weights rounded once more


def test_a_very_long_image_is_resized_in_bounded_memory() -> None:
    long = Image.new("RGB", (200_000, 20), (10, 20, 30))
    assert Preprocess(size=224, resize="shortest", crop="center").pixels(long)[:, 0, 0].tolist() == [10, 20, 30]


def test_squash_and_normalisation_equal_torchvision() -> None:
    image, ours = _image(), Preprocess(size=32)
    theirs = v2.Compose(
        [
            v2.Resize((32, 32), v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(ours.mean, ours.std),
        ]
    )
    found = ours.normalise(ours.pixels(image)[None])[0]
    np.testing.assert_allclose(found, theirs(image).numpy(), atol=2e-6)


def test_training_and_deployment_see_the_same_numbers() -> None:
    from vpr.data.loaders import Normalise

    ours = Preprocess(size=32)
    pixels = ours.pixels(_image())[None]
    in_training = Normalise(ours)(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(in_training, ours.normalise(pixels), atol=1e-6)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_exif_orientation_is_applied_as_pillow_does(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(_image(60, 40), form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_bytes(data, "x")), np.asarray(expected))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_that_is_none_does_not_lose_a_good_image(form: str) -> None:
    data = encoded(_image(60, 40), form, exif=b"<html>" * 9)
    assert decode_bytes(data, "x").size == (60, 40)
    assert decode_bytes(data, "x", box=(0, 0, 20, 10)).size == (20, 10)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_broken_image_is_refused_with_a_box_as_without(form: str) -> None:
    """The orientation that a box asks for may stand behind the pixels, whose faults reading it must not forgive."""
    data = bytearray(encoded(_image(), form))
    for place in range(len(data) // 3, len(data)):
        broken = bytes(data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :])
        found: list[bytes | None] = []
        for box in (None, (0, 0, 60, 40)):
            try:
                found.append(decode_bytes(broken, "x", box).tobytes())
            except ImageRejected:
                found.append(None)
        assert found[0] == found[1], place


def test_an_orientation_behind_the_pixels_turns_the_box_too() -> None:
    image = _image()
    exif = Image.Exif()
    exif[0x0112] = 6
    head = encoded(image, "PNG")
    block = b"eXIf" + exif.tobytes()[6:]
    behind = head[:-12] + struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block)) + head[-12:]
    whole = decode_bytes(behind, "x")
    assert whole.size == (40, 60)
    assert decode_bytes(behind, "x", (3, 5, 20, 30)).tobytes() == whole.crop((3, 5, 23, 35)).tobytes()


def test_too_little_memory_is_not_taken_for_a_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ImageRejected, match="there is too little memory to decode it"):
        decode_bytes(encoded(_image(), "PNG"), "x")


def test_a_broken_exif_tag_does_not_lose_a_good_image() -> None:
    # A camera's ResolutionUnit of a wrong type: Pillow can read the tags but not write them anew.
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
def test_any_damage_gives_a_image_or_a_refusal(form: str, changes: list[tuple[int, int]], length: float) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    data = bytearray(encoded(_image(20, 30), form, **({} if form in ("BMP", "GIF") else {"exif": exif})))
    for place, value in changes:
        data[place % len(data)] = value
    with contextlib.suppress(ImageRejected):
        Preprocess(size=16).pixels(decode_bytes(bytes(data[: int(length * len(data))]), "x", shortest=16))


def test_alpha_lies_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert np.asarray(decode_bytes(encoded(clear, "PNG"), "x")).min() == 255


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    deep = Image.fromarray(np.full((9, 9), 0x8000, dtype=np.uint16))
    image = deep if mode == "I;16" else _image(9, 9).convert(mode)
    found = decode_bytes(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), "x")
    assert (found.mode, found.size) == ("RGB", (9, 9))
    if mode == "I;16":
        assert np.unique(np.asarray(found)).tolist() == [128]


def test_jpeg_is_decoded_small_but_never_below_what_is_needed() -> None:
    data = encoded(_image(1200, 800), "JPEG")
    assert decode_bytes(data, "x", shortest=64).size == (300, 200)
    assert min(decode_bytes(data, "x", shortest=300).size) >= 600


def test_box_is_cut_from_the_full_image() -> None:
    data = encoded(_image(), "PNG")
    cut = decode_bytes(data, "x", box=(10, 5, 20, 30), shortest=4)
    np.testing.assert_array_equal(np.asarray(cut), np.asarray(_image())[5:35, 10:30])
    with pytest.raises(ImageRejected, match="lies outside the 60x40 image"):
        decode_bytes(data, "x", box=(100, 5, 20, 30))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_box_is_cut_at_the_same_place_from_a_reduced_jpeg(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(_image(1203, 805), "JPEG", quality=95, exif=exif)
    box = (101, 53, 610, 505)
    full, reduced = decode_bytes(data, "x", box), decode_bytes(data, "x", box, shortest=60)
    assert full.size == (610, 505)
    assert reduced.size == (153, 127)  # a quarter; an eighth would be less than twice what is needed
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
def test_a_reduced_box_is_twice_what_is_needed_or_whole(
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
def test_truncated_files_are_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    data = encoded(_image(300, 200), form)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageRejected, match=rf"{path}: truncated or broken image"):
        decode(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageRejected, match="replace the file"):
        decode(path)


@pytest.mark.parametrize(
    ("side", "reason"), [(12_000, f"12000x12000 pixels, more than {MAX_PIXELS // 2}"), (60_000, "decompression bomb")]
)
def test_a_header_that_promises_too_much_is_refused_before_allocation(side: int, reason: str) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ImageRejected, match=reason):
        decode_bytes(png, "bomb.png")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jpg", tmp_path):
        with pytest.raises(ImageRejected, match=str(path)):
            decode(path)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageRejected, match=r"pipe\.jpg: not a file"):
        decode(tmp_path / "pipe.jpg")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ImageRejected, match=f"more than {MAX_FILE_BYTES}"):
        decode(tmp_path / "huge.jpg")


@pytest.mark.parametrize(
    "numbers", [{"mean": (0.5, float("nan"), 0.5)}, {"std": (0.2, 0.0, 0.2)}, {"std": (0.2, float("inf"), 0.2)}]
)
def test_a_normalisation_that_makes_inputs_without_end_is_refused(numbers: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValidationError, match="Input should be"):
        Preprocess(size=32, **numbers)
