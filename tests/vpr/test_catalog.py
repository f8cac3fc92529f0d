from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from vpr.artifact import load_artifact
from vpr.catalog import (
    SCHEMA,
    Catalog,
    CatalogConfig,
    build_catalog,
    check_leaks,
    load_catalog,
    split_by_product,
    table_of,
    write_catalog,
)
from vpr.duplicates import merge, near_pairs
from vpr.errors import UserError


def _rows(counts: list[int]) -> list[dict[str, object]]:
    fixed = {"category": "", "role": "train", "split": "train", "box": None, "source": "made"}
    return [
        {**fixed, "image": f"{p}/{i}.jpg", "product": f"p{p}", "sha256": f"{p}-{i}"}
        for p, count in enumerate(counts)
        for i in range(count)
    ]


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(1, 6), min_size=4, max_size=30),
    validation=st.floats(0.0, 0.45),
    test=st.floats(0.05, 0.45),
    seed=st.integers(0, 5),
    shuffle=st.randoms(),
)
def test_splits_are_by_product_and_do_not_depend_on_the_order(
    counts: list[int], validation: float, test: float, seed: int, shuffle: object
) -> None:
    assume(round(test * len(counts)) and (validation == 0 or round(validation * len(counts))))
    assume(sum(count > 1 for count in counts) >= round(test * len(counts)) + round(validation * len(counts)))
    rows = _rows(counts)
    first = split_by_product(table_of(rows), validation, test, seed).to_pylist()
    shuffle.shuffle(rows)
    second = split_by_product(table_of(rows), validation, test, seed).to_pylist()
    by_image = {row["image"]: row for row in second}
    assert all(by_image[row["image"]] == row for row in first)
    for product in {row["product"] for row in first}:
        group = [row for row in first if row["product"] == product]
        assert len({row["split"] for row in group}) == 1
        if group[0]["split"] != "train":
            roles = [row["role"] for row in group]
            assert "query" in roles
            assert "gallery" in roles
    tests = {row["product"] for row in first if row["split"] == "test"}
    assert len(tests) == round(test * len(counts))


def test_a_built_catalogue_is_read_back_and_selected(catalog: Catalog) -> None:
    assert catalog.table.schema.equals(SCHEMA)
    assert len(catalog) == 128
    assert {len(set(catalog.select(split=s).products)) for s in ("validation", "test")} == {4}
    gallery = catalog.select(split="test", role="gallery")
    assert len(gallery) == 16
    assert gallery.path(0).is_file()
    assert gallery.box(0) is None
    assert catalog.summary()["products"] == {"train": 8, "validation": 4, "test": 4}


def test_checksum_ignores_the_order_of_rows(catalog: Catalog) -> None:
    turned = Catalog(catalog.table.take(pa.array(np.arange(len(catalog))[::-1])), catalog.root)
    assert turned.sha256 == catalog.sha256
    assert catalog.select(split="test").sha256 != catalog.sha256


def test_reading_unchanged_pictures_again_keeps_the_artifact(texture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(texture_folder, root)
    config = CatalogConfig(reader="folder", root=str(root), output=str(tmp_path / "c"), test=0.5)
    first = load_artifact(build_catalog(config)).sha256
    assert load_artifact(build_catalog(config)).sha256 == first
    (root / "product-00" / "0.jpg").unlink()
    assert load_artifact(build_catalog(config)).sha256 != first


def test_unreadable_pictures_are_set_aside_with_a_reason(texture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for product in ("a", "b"):
        (root / product).mkdir(parents=True)
        (root / product / "1.jpg").write_bytes((texture_folder / "product-00" / "1.jpg").read_bytes())
    (root / "a" / "2.jpg").write_bytes(b"GIF?")
    config = CatalogConfig(reader="folder", root=str(root), output=str(tmp_path / "c"), skip_unreadable=True)
    built = load_artifact(build_catalog(config))
    assert built.card.metrics == {"pictures": 2, "set_aside": 1}
    assert built.file("set_aside.csv").read_text() == "image,reason\na/2.jpg,not a picture\n"


def test_a_changed_box_is_not_taken_for_up_to_date(texture_folder: Path, tmp_path: Path) -> None:
    shutil.copy(texture_folder / "product-00" / "0.jpg", tmp_path / "a.jpg")
    config = CatalogConfig(reader="csv", root=str(tmp_path / "t.csv"), output=str(tmp_path / "c"))
    seen = []
    for left in (1, 9):
        (tmp_path / "t.csv").write_text(f"image,product,box_x,box_y,box_w,box_h\na.jpg,shoe,{left},1,5,5\n")
        seen.append(load_catalog(build_catalog(config)))
    assert [catalog.box(0) for catalog in seen] == [(1, 1, 5, 5), (9, 1, 5, 5)]
    assert seen[0].sha256 != seen[1].sha256


def test_leaks_of_products_and_of_bytes_are_refused(catalog: Catalog) -> None:
    check_leaks(catalog.select(split="train"), catalog.select(split="test"))
    with pytest.raises(UserError, match="leak: 4 products are both trained and scored"):
        check_leaks(catalog, catalog.select(split="test"))
    renamed = [{**row, "product": "other"} for row in catalog.select(split="test").table.to_pylist()]
    again = Catalog(pa.Table.from_pylist(renamed, schema=SCHEMA), catalog.root)
    with pytest.raises(UserError, match=r"leak: 32 pictures \(same bytes\) are both"):
        check_leaks(again, catalog.select(split="test"))


def test_merging_a_catalogue_with_part_of_itself_adds_no_rows_and_says_which(catalog: Catalog) -> None:
    test = catalog.select(split="test")
    joined, duplicates = merge([catalog, test])
    assert joined.sha256 == catalog.sha256
    assert len(duplicates.same_bytes) == len(test)
    assert all(later == earlier for later, earlier in duplicates.same_bytes)


def test_merging_reports_copies_and_near_copies_of_another_source(
    catalog: Catalog, texture_folder: Path, tmp_path: Path
) -> None:
    shop = tmp_path / "shop" / "shoe"
    shop.mkdir(parents=True)
    shutil.copy(texture_folder / "product-03" / "2.jpg", shop / "copy.jpg")
    with Image.open(texture_folder / "product-05" / "4.jpg") as picture:
        picture.resize((80, 80)).save(shop / "larger.png")
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


@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.integers(0, 20), st.integers(1, 40))
def test_near_pairs_equal_a_plain_loop(values: list[int], bits: int, block: int) -> None:
    values = [*values, *(value ^ 5 for value in values)]
    expected = []
    for later, value in enumerate(values):
        distances = [(value ^ other).bit_count() for other in values[:later]]
        if distances and min(distances) <= bits:
            expected.append([later, distances.index(min(distances))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpr.duplicates._BLOCK", block)
        assert near_pairs(np.array(values, dtype=np.uint64), bits).tolist() == expected


def test_shares_that_leave_no_training_are_refused() -> None:
    with pytest.raises(UserError, match="together less than 1"):
        split_by_product(table_of(_rows([2, 2])), 0.5, 0.5, 0)


def test_a_share_that_comes_to_no_product_is_refused() -> None:
    with pytest.raises(UserError, match=r"validation 0\.1: is none of 2 products"):
        split_by_product(table_of(_rows([2, 2])), 0.1, 0, 0)
    with pytest.raises(UserError, match=r"test 0\.5: is none of 4 products, 0 of which have the two pictures"):
        split_by_product(table_of(_rows([1, 1, 1, 1])), 0, 0.5, 0)


def test_an_unknown_role_is_refused() -> None:
    rows = _rows([1])
    rows[0]["role"] = "spectator"
    with pytest.raises(UserError, match="role 'spectator' is not known"):
        table_of(rows)


def test_two_hundred_thousand_rows_are_split_in_seconds() -> None:
    import time

    rows = _rows([20] * 10_000)
    begun = time.monotonic()
    table = split_by_product(table_of(rows), 0.1, 0.1, 0)
    Catalog(table, Path()).select(split="train").summary()
    assert table.num_rows == 200_000
    assert time.monotonic() - begun < 30  # a bound against quadratic work, not a benchmark


def test_a_catalogue_of_another_form_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from vpr.artifact import write_artifact

    with write_artifact(tmp_path / "c", "catalog", {"root": "."}) as draft:
        pq.write_table(pa.table({"image": ["a"]}), draft.path / "catalog.parquet")
    with pytest.raises(UserError, match="not a catalogue"):
        load_catalog(tmp_path / "c")


def test_a_card_that_does_not_say_where_the_pictures_are_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from vpr.artifact import write_artifact

    with write_artifact(tmp_path / "c", "catalog", {}) as draft:
        pq.write_table(catalog.table, draft.path / "catalog.parquet")
    with pytest.raises(UserError, match="does not say where the pictures are"):
        load_catalog(tmp_path / "c")
