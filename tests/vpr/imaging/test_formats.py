"""Formats of telephones and the web: AVIF, HEIC, files without a suffix, and very large JPEGs."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.vpr.data.shops import set_aside
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig
from vpr.imaging import limits
from vpr.imaging.decode import ImageRejected, decode, decode_bytes, read_header
from vpr.imaging.formats import can_read_heic, is_heic, is_image_content

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
# `_image()`, encoded by pillow-heif 1.8.1 at quality 90 without chroma subsampling.
UPRIGHT = Path(__file__).with_name("upright.heic")


def _image(side: int = 64) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return coarse.resize((side * 3 // 2, side), Image.Resampling.BICUBIC)


def _encoded(form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    _image().save(stream, form, **options)
    return stream.getvalue()


def test_avif_is_decoded_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _encoded("AVIF", quality=95, exif=exif)
    decoded = decode_bytes(data, "x.avif")
    expected = np.asarray(_image().transpose(Image.Transpose.ROTATE_270), dtype=int)
    assert np.abs(np.asarray(decoded, dtype=int) - expected).mean() < 4
    assert read_header(data, "x.avif") == (96, 64, 6)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_formats_are_known_by_content(form: str) -> None:
    assert is_image_content(_encoded(form)[:32])
    assert not is_heic(_encoded(form)[:32])


@pytest.mark.parametrize(
    "data", [HEIC, b"hello, no image", b"", b"<svg/>", b"%PDF-1.7", b"\0\0\0\x18ftypisom" + bytes(20)]
)
def test_other_files_are_not_images(data: bytes) -> None:
    assert not is_image_content(data[:32]) or data is HEIC
    assert is_heic(data[:32]) == (data is HEIC)


@pytest.fixture
def without_heic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that pi-heif is not installed."""
    can_read_heic.cache_clear()
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "pi_heif", None)
        yield
    can_read_heic.cache_clear()


def test_heic_needs_a_package(without_heic: None) -> None:
    assert not is_image_content(HEIC[:32])
    with pytest.raises(ImageRejected, match=r"HEIC, which needs pi-heif: run `pip install -r requirements-heic\.txt`"):
        decode_bytes(HEIC, "x.jpg")


def test_heic_is_decoded() -> None:
    difference = np.asarray(decode(UPRIGHT), dtype=int) - np.asarray(_image(), dtype=int)
    assert np.abs(difference).mean() < 3
    assert read_header(UPRIGHT.read_bytes(), UPRIGHT) == (96, 64, 1)
    assert decode(UPRIGHT, (10, 20, 30, 40)).size == (30, 40)


@pytest.mark.parametrize("seed", range(40))
def test_broken_heic_is_rejected(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(UPRIGHT.read_bytes())
    for position in rng.integers(12, len(data), 16):
        data[position] = rng.integers(256)
    with contextlib.suppress(ImageRejected):
        decode_bytes(bytes(data[: int(rng.integers(32, len(data) + 1))]), "x.heic")


def test_heic_above_the_limit_is_rejected() -> None:
    data = UPRIGHT.read_bytes()
    size = data.index(b"ispe") + 8
    huge = data[:size] + (9000).to_bytes(4, "big") * 2 + data[size + 8 :]
    with pytest.raises(ImageRejected, match="9000x9000 pixels, more than 50000000"):
        decode_bytes(huge, "x.heic")


@pytest.mark.parametrize("reader", ["folder", "images"])
def test_folders_with_files_of_all_formats(tmp_path: Path, reader: str, without_heic: None) -> None:
    root = tmp_path / "shop" / "shoe"
    root.mkdir(parents=True)
    for number, (name, form) in enumerate([("1.avif", "AVIF"), ("2.JFIF", "JPEG"), ("3", "PNG"), ("4.v2", "PNG")]):
        _image(64 + number).save(root / name, form)
    for name, data in (("5.heic", HEIC), ("6", HEIC), ("README", b"hello"), (".hidden", _encoded("PNG"))):
        (root / name).write_bytes(data)
    config = CatalogConfig(reader=reader, root=str(tmp_path / "shop"), output=str(tmp_path / "c"))  # type: ignore[arg-type]
    catalog = load_catalog(build_catalog(config))
    assert catalog.table["image"].to_pylist() == ["shoe/1.avif", "shoe/2.JFIF", "shoe/3"]
    assert set_aside(catalog).count("HEIC, which needs pi-heif") == 2
    assert all(f"shoe/{name},unknown suffix" in set_aside(catalog) for name in ("4.v2", "README"))
    assert "shoe/.hidden,its name or folder starts with a dot" in set_aside(catalog)


@pytest.mark.parametrize("reader", ["folder", "images"])
def test_folders_with_heic(tmp_path: Path, reader: str) -> None:
    root = tmp_path / "shop" / "shoe"
    root.mkdir(parents=True)
    for number, name in enumerate(("1.HEIC", "2")):
        (root / name).write_bytes(UPRIGHT.read_bytes() + bytes(number))
    config = CatalogConfig(reader=reader, root=str(tmp_path / "shop"), output=str(tmp_path / "c"))  # type: ignore[arg-type]
    catalog = load_catalog(build_catalog(config))
    assert catalog.table["image"].to_pylist() == ["shoe/1.HEIC", "shoe/2"]


_DECODE = """
import re, sys
from vpr.imaging.decode import decode
box = eval(sys.argv[2])
size = decode(sys.argv[1], box, eval(sys.argv[3])).size
print(*size, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG of 108 megapixels, as telephones write them, with a red rectangle."""
    path = tmp_path_factory.mktemp("large") / "108.jpg"
    image = Image.new("RGB", (12_000, 9_000), (20, 120, 200))
    image.paste((250, 0, 0), (6_000, 4_000, 8_000, 5_000))
    image.save(path, quality=80)
    return path


@pytest.mark.parametrize(
    ("box", "shortest", "size"),
    [
        (None, 224, (1500, 1125)),
        (None, None, (6000, 4500)),
        ((6000.0, 4000.0, 2000.0, 1000.0), 224, (1000, 500)),
        ((6000.0, 4000.0, 200.0, 100.0), 224, (100, 50)),
    ],
)
def test_large_jpeg_is_decoded_in_bounded_memory(
    large: Path, box: tuple[float, ...] | None, shortest: int | None, size: tuple[int, int]
) -> None:
    command = [sys.executable, "-c", _DECODE, str(large), repr(box), repr(shortest)]
    width, height, mebibytes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert (int(width), int(height)) == size
    assert int(mebibytes) < 450  # the pixels alone would take 412


def test_crop_of_a_large_jpeg_is_at_its_place(large: Path) -> None:
    crop = np.asarray(decode(large, (6_008.0, 4_008.0, 1_984.0, 984.0), 224), dtype=int)
    assert np.abs(crop - (250, 0, 0)).max() < 8


def _claim(data: bytes, height: int, width: int) -> bytes:
    """Return a baseline JPEG whose header claims another size; the rest of the image is then grey."""
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[start + 4 :]


@pytest.mark.parametrize(("height", "factor"), [(16_666, 2), (18_000, 4), (65_000, 4)])
def test_jpeg_of_more_pixels_than_pillow_opens_is_reduced(
    large: Path, tmp_path: Path, height: int, factor: int
) -> None:
    """200, 216 and 780 megapixels: the largest telephones have 200."""
    width = 12_000
    assert height * width > 2 * Image.MAX_IMAGE_PIXELS  # type: ignore[operator]
    (tmp_path / "x.jpg").write_bytes(_claim(large.read_bytes(), height, width))
    assert read_header((tmp_path / "x.jpg").read_bytes(), "x.jpg") == (width, height, 1)
    command = [sys.executable, "-c", _DECODE, str(tmp_path / "x.jpg"), "None", "None"]
    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert [int(value) for value in done[:2]] == [width // factor, height // factor]
    assert int(done[2]) < 450


def test_largest_reduction_keeps_within_the_bound() -> None:
    for pixels in (limits.MAX_PIXELS + 1, 200_000_000, 200_000_001, 800_000_001, limits.MAX_JPEG_PIXELS):
        assert pixels / limits.reduction(pixels) ** 2 <= limits.MAX_PIXELS / 2
    assert limits.reduction(limits.MAX_PIXELS) == 1


def test_larger_jpeg_is_rejected(large: Path) -> None:
    with pytest.raises(ImageRejected, match="50000x20001 pixels, more than 1000000000"):
        decode_bytes(_claim(large.read_bytes(), 20_001, 50_000), "x.jpg")
