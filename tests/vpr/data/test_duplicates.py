from __future__ import annotations

import shutil
import time
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.catalogs import write_catalog
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog, rows_to_table
from vpr.data.config import CatalogConfig
from vpr.data.duplicates import find_near_pairs, merge


def test_merging_a_part_of_itself_adds_no_rows(catalog: Catalog) -> None:
    test = catalog.select(split="test")
    joined, duplicates = merge([catalog, test])
    assert joined.sha256 == catalog.sha256
    assert len(duplicates.same_bytes) == len(test)
    assert all(later == earlier for later, earlier in duplicates.same_bytes)


def test_merging_reports_copies_and_near_duplicates(catalog: Catalog, texture_folder: Path, tmp_path: Path) -> None:
    shop = tmp_path / "shop" / "shoe"
    shop.mkdir(parents=True)
    shutil.copy(texture_folder / "product-03" / "2.jpg", shop / "copy.jpg")
    with Image.open(texture_folder / "product-05" / "4.jpg") as image:
        image.resize((80, 80)).save(shop / "larger.png")
    config = CatalogConfig(reader="folder", root=str(tmp_path / "shop"), output=str(tmp_path / "catalog"))
    joined, duplicates = merge([catalog, load_catalog(build_catalog(config))])
    assert len(joined) == len(catalog) + 2
    assert all(joined.path(row).is_file() for row in range(len(joined)))
    (same,) = duplicates.same_bytes
    assert [name.split("/")[-2:] for name in same] == [["shoe", "copy.jpg"], ["product-03", "2.jpg"]]
    (near,) = [pair for pair in duplicates.near_same if "shoe" in pair[0]]
    assert [name.split("/")[-2:] for name in near] == [["shoe", "larger.png"], ["product-05", "4.jpg"]]
    again = load_catalog(write_catalog(tmp_path / "joined", joined))
    assert again.sha256 == joined.sha256
    assert again.path(0) == joined.path(0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.integers(0, 64), st.integers(1, 40), st.randoms())
def test_near_pairs_equal_a_simple_loop(values: list[int], bits: int, block: int, random: Random) -> None:
    values = [*values, *values[:3], *(value ^ 5 for value in values), *(value ^ (0b1011 << 20) for value in values)]
    random.shuffle(values)
    expected = []
    for later, value in enumerate(values):
        distances = [(value ^ other).bit_count() for other in values[:later]]
        if distances and min(distances) <= bits:
            expected.append([later, distances.index(min(distances))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpr.data.duplicates._BLOCK", block)
        assert find_near_pairs(np.array(values, dtype=np.uint64), bits).tolist() == expected


@pytest.mark.parametrize("zeros", [0, 150_000])
def test_200k_hashes_are_compared_in_seconds(zeros: int) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64 - 1, 200_000, dtype=np.uint64)
    hashes[:zeros] = 0
    hashes[-1] = hashes[-2] ^ np.uint64(0b1001)
    start = time.monotonic()
    pairs = find_near_pairs(hashes, 4)
    assert time.monotonic() - start < 60  # comparing all with all takes minutes
    assert len(pairs) == max(0, zeros - 1) + 1
    assert pairs[-1].tolist() == [199_999, 199_998]


def test_merged_paths_are_normalised(tmp_path: Path) -> None:
    def table(names: list[str], product: str) -> pa.Table:
        fixed = {"category": "", "role": "train", "split": "train", "box": None, "source": "made"}
        return rows_to_table([{**fixed, "image": name, "product": product, "sha256": name[-5:]} for name in names])

    for name in ("a/x/1.png", "a/x/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), "white").save(tmp_path / name)
    first = Catalog(table(["x/1.png", "./x//1.png", "x/2.png"], "p"), tmp_path / "a")
    second = Catalog(table(["3.png"], "q"), tmp_path / "b")
    joined, duplicates = merge([first, second])
    assert joined.table["image"].to_pylist() == ["a/x/1.png", "a/x/2.png", "b/3.png"]
    assert joined.root == tmp_path.resolve()
    assert duplicates.same_bytes == [("a/x/1.png", "a/x/1.png")]
    assert duplicates.near_same == [("a/x/2.png", "a/x/1.png"), ("b/3.png", "a/x/1.png")]


def test_merging_keeps_an_image_in_each_of_its_roles(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), "white").save(tmp_path / "1.png")
    fixed = {"image": "1.png", "product": "p", "category": "", "split": "test", "box": None, "source": "made"}
    rows = [{**fixed, "role": role, "sha256": "a"} for role in ("query", "gallery", "query")]
    joined, duplicates = merge([Catalog(rows_to_table(rows), tmp_path)])
    assert joined.roles.tolist() == ["query", "gallery"]
    assert duplicates.same_bytes == [("1.png", "1.png")]
