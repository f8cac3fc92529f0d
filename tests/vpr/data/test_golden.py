from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin

import vpr.data.sample
from experiments.serving.pack_golden import pack
from vpr.data import golden

_ORIENTATION_TAG = 0x0112


def test_images_cover_the_cases() -> None:
    images = [Image.open(golden.FOLDER / name) for name in golden.IMAGES]
    assert [(image.format, image.mode) for image in images] == [
        *[("JPEG", "RGB"), ("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "RGB")],
        *[("JPEG", "L"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("PNG", "RGB")],
    ]
    assert [JpegImagePlugin.get_sampling(image) for image in images[:2]] == [2, 0]  # 4:2:0 and 4:4:4
    turned = [image.getexif().get(_ORIENTATION_TAG, 1) for image in images]
    assert turned == [1, 1, 1, 6, 1, 1, 1, 1]
    alpha = np.asarray(images[5])[:, :, 3]
    assert (alpha.min(), alpha.max()) == (0, 255)
    assert images[6].height == 4 * images[6].width
    assert max(images[7].size) <= 40
    assert sum((golden.FOLDER / name).stat().st_size for name in golden.IMAGES) < 700_000


def test_images_are_licensed() -> None:
    with (golden.FOLDER / golden.ATTRIBUTION).open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["license"] for row in rows} == {"CC0-1.0"}
    sample = (Path(vpr.data.sample.__file__).parent / "ATTRIBUTION.csv").read_text(encoding="utf-8")
    assert all(f"{row['product']}," in sample for row in rows)


def test_packing_again_gives_the_same_pixels(tmp_path: Path) -> None:
    pack(tmp_path)
    for name in golden.IMAGES:
        with Image.open(tmp_path / name) as packed, Image.open(golden.FOLDER / name) as stored:
            assert packed.mode == stored.mode
            np.testing.assert_array_equal(np.asarray(packed), np.asarray(stored))
    attribution = (tmp_path / golden.ATTRIBUTION).read_bytes()
    assert attribution == (golden.FOLDER / golden.ATTRIBUTION).read_bytes()
