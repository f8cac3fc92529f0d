from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.vpr.data.shops import build, write_images, write_table
from vpr.data import pixels
from vpr.data.catalog import Catalog
from vpr.data.pixels import KeptPixels, read_pixels
from vpr.imaging.decode import Box
from vpr.imaging.preprocess import Preprocess

SMALL, LARGE = Preprocess(size=32), Preprocess(size=48)
OTHER_LAYOUT = Preprocess(size=32, layout="NHWC", dtype="uint8")


@pytest.fixture
def shop(tmp_path: Path) -> Catalog:
    rows = write_images(tmp_path, products=4, views=2)
    write_table(tmp_path / "shop.csv", "image,product", [list(row) for row in rows])
    return build(tmp_path / "shop.csv")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that are decoded from now on."""
    names: list[str] = []
    decode = pixels.decode

    def record(path: Path, box: Box | None, size: int) -> object:
        names.append(path.name)
        return decode(path, box, size)

    monkeypatch.setattr(pixels, "decode", record)
    return names


def test_kept_images_are_decoded_once(shop: Catalog, decoded: list[str]) -> None:
    kept, rows = KeptPixels(), range(8)
    expected = {preprocess: read_pixels(shop, preprocess, rows) for preprocess in (SMALL, LARGE)}
    decoded.clear()
    for preprocess in (SMALL, LARGE, OTHER_LAYOUT, SMALL):
        read = np.concatenate([kept.read(shop, preprocess, block) for block in (range(5), range(5, 8))])
        np.testing.assert_array_equal(read, expected[SMALL if preprocess is OTHER_LAYOUT else preprocess])
    assert len(decoded) == 2 * len(rows)


def test_rows_of_another_selection_are_the_same_images(shop: Catalog, decoded: list[str]) -> None:
    kept = KeptPixels()
    everything = kept.read(shop, SMALL, range(8))
    decoded.clear()
    backwards = shop.take(np.arange(8)[::-1])
    np.testing.assert_array_equal(kept.read(backwards, SMALL, range(8)), everything[::-1])
    assert not decoded


def test_images_beyond_the_limit_are_decoded_again(shop: Catalog, decoded: list[str]) -> None:
    kept, expected = KeptPixels(limit=3 * 3 * 32 * 32 + 1), read_pixels(shop, SMALL, range(8))
    for count in (8, 5):
        decoded.clear()
        np.testing.assert_array_equal(kept.read(shop, SMALL, range(8)), expected)
        assert len(decoded) == count
