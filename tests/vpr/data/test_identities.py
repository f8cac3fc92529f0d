"""Product ids and repeated images: what is normalised, set aside, counted, and what stops."""

from __future__ import annotations

import logging
import shutil
import tarfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.vpr.data.shops import build, set_aside, write_images, write_table
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.identities import normalise_id


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    logging.getLogger("vpr").propagate = True
    return caplog


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("SKU1", "SKU1 "),
        ("SKU1", "\tSKU1"),
        ("SKU1", "SKU1\u00a0"),
        ("SKU1", "SKU1\u200b"),
        ("SKU 1", "SKU\u00a0 1"),
        ("caf\u00e9", "cafe\u0301"),
    ],
)
def test_spellings_of_an_id_are_one_product(tmp_path: Path, first: str, second: str) -> None:
    names = [name for name, _ in write_images(tmp_path, 1, 2)]
    write_table(tmp_path / "t.csv", "image,product", [[names[0], first], [names[1], second]])
    assert build(tmp_path / "t.csv").products.tolist() == [first, first]


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=12))
def test_normalised_ids_are_stable(text: str) -> None:
    once = normalise_id(text)
    assert normalise_id(once) == once == unicodedata.normalize("NFC", once)
    assert once == once.strip()


def test_different_ids_stay_different(tmp_path: Path) -> None:
    ids = ["sku1", "SKU1", "SKU-1", "SKU01", "\u0421KU1"]  # the last has a Cyrillic letter
    rows = [[name, product] for (name, _), product in zip(write_images(tmp_path, 5, 1), ids, strict=True)]
    write_table(tmp_path / "t.csv", "image,product", rows)
    assert build(tmp_path / "t.csv").products.tolist() == ids


@pytest.mark.parametrize("missing", ["nan", "NaN", "None", "null", "", " ", "\u00a0", "#N/A"])
def test_missing_ids_stop_or_are_set_aside(tmp_path: Path, missing: str) -> None:
    rows = [[name, missing if name.endswith("1.png") else product] for name, product in write_images(tmp_path, 3, 2)]
    write_table(tmp_path / "t.csv", "image,product", rows)
    with pytest.raises(UserError, match=r"t\.csv: 3 of 6 rows cannot be used \(line 3 \(img/0-1\.png\): no product id"):
        build(tmp_path / "t.csv")
    assert not (tmp_path / "catalog-t").exists()
    catalog = build(tmp_path / "t.csv", skip_invalid_rows=True)
    assert catalog.products.tolist() == ["SKU0", "SKU1", "SKU2"]
    assert set_aside(catalog).count("no product id") == 3


@pytest.mark.parametrize(("ids", "expected"), [(["4", "4.0", "12.0"], ["4", "4", "12"]), (["4.0", "x"], ["4.0", "x"])])
def test_decimals_of_numeric_ids_are_dropped(tmp_path: Path, ids: list[str], expected: list[str]) -> None:
    rows = [[name, product] for (name, _), product in zip(write_images(tmp_path, len(ids), 1), ids, strict=True)]
    write_table(tmp_path / "t.csv", "image,product", rows)
    assert build(tmp_path / "t.csv").products.tolist() == expected


def test_decimals_next_to_other_ids_stop(tmp_path: Path) -> None:
    names = [name for name, _ in write_images(tmp_path, 3, 1)]
    write_table(tmp_path / "t.csv", "image,product", [[names[0], "4"], [names[1], "4.0"], [names[2], "x"]])
    with pytest.raises(UserError, match=r"1 product ids are also written as a decimal \('4' and '4\.0'\)"):
        build(tmp_path / "t.csv")


def test_decimals_of_one_aicrowd_table_match_the_other(tmp_path: Path) -> None:
    write_images(tmp_path, 2, 1)
    write_table(tmp_path / "gallery.csv", "img_path,product_id", [["img/0-0.png", "5"]])
    header = "img_path,product_id,bbox_x,bbox_y,bbox_w,bbox_h"
    write_table(tmp_path / "queries.csv", header, [["img/1-0.png", "5.0", 1, 1, 50, 50]])
    config = CatalogConfig(reader="aicrowd", root=str(tmp_path), output=str(tmp_path / "c"))
    assert load_catalog(build_catalog(config)).products.tolist() == ["aicrowd/5"] * 2


@pytest.mark.parametrize("copies", [False, True])
def test_image_of_several_products_is_set_aside(tmp_path: Path, copies: bool, notes: pytest.LogCaptureFixture) -> None:
    rows: list[list[object]] = [list(pair) for pair in write_images(tmp_path, 4, 2)]
    Image.new("RGB", (60, 60), "red").save(tmp_path / "img/chart.png")
    for product in range(3):
        name = f"img/chart-{product}.png" if copies else "img/chart.png"
        if copies:
            shutil.copyfile(tmp_path / "img/chart.png", tmp_path / name)
        rows.append([name, f"SKU{product}"])
    write_table(tmp_path / "t.csv", "image,product", rows)
    catalog = build(tmp_path / "t.csv")
    assert set_aside(catalog).count('"under 3 products: SKU0, SKU1, SKU2"') == 3
    assert "images under several products: 1, 3 rows set aside" in notes.text
    for built in (catalog, build(tmp_path / "t.csv", test=0.5)):
        assert len(built) == 8
        assert not [name for name in built.table["image"].to_pylist() if "chart" in name]
        assert set_aside(built).count("chart") >= 3


def test_one_image_shows_several_products_in_different_boxes(tmp_path: Path) -> None:
    write_images(tmp_path, 1, 1)
    rows = [["img/0-0.png", "a", 0, 0, 50, 50], ["img/0-0.png", "b", 50, 20, 50, 50]]
    write_table(tmp_path / "t.csv", "image,product,box_x,box_y,box_w,box_h", rows)
    assert build(tmp_path / "t.csv").products.tolist() == ["a", "b"]


@pytest.mark.parametrize("box", [[0, 0, 120, 90], [-2, 0, 125, 90.4], [0.3, 0.2, 119.3, 89.6]])
def test_box_of_the_full_image_is_the_image(tmp_path: Path, box: list[object], notes: pytest.LogCaptureFixture) -> None:
    names = [name for name, _ in write_images(tmp_path, 2, 2)]
    rows: list[list[object]] = [
        [names[0], "a", "query", *box],
        [names[1], "a", "query", 0, 0, 119, 90],
        [names[0], "a", "gallery", "", "", "", ""],
        [names[1], "a", "gallery", "", "", "", ""],
        [names[2], "b", "gallery", *box],
        [names[2], "c", "gallery", "", "", "", ""],
        [names[3], "b", "gallery", *box],
        [names[3], "b", "gallery", "", "", "", ""],
    ]
    write_table(tmp_path / "t.csv", "image,product,role,box_x,box_y,box_w,box_h", rows)
    catalog = build(tmp_path / "t.csv")
    assert [catalog.box(row) for row in range(len(catalog))] == [(0, 0, 119, 90), None, None, None]
    assert catalog.table["image"].to_pylist() == [names[1], names[0], names[1], names[3]]
    listed = set_aside(catalog)
    assert f"{names[0]},query equals gallery image {names[0]}" in listed
    assert listed.count(f'{names[2]},"under 2 products: b, c"') == 2
    assert f"{names[3]},repeats an earlier row" in listed
    assert "boxes: 4 from box_x, box_y, box_w, box_h" in notes.text


def test_unlabelled_copies_stay(tmp_path: Path) -> None:
    write_images(tmp_path / "shop", 1, 1)
    shutil.copyfile(tmp_path / "shop/img/0-0.png", tmp_path / "shop/img/copy.png")
    config = CatalogConfig(reader="images", root=str(tmp_path / "shop"), output=str(tmp_path / "c"))
    assert len(load_catalog(build_catalog(config))) == 2


def test_repeated_rows_are_kept_once(tmp_path: Path) -> None:
    rows = [list(pair) for pair in write_images(tmp_path, 2, 1)]
    write_table(tmp_path / "t.csv", "image,product", [*rows, rows[0]])
    catalog = build(tmp_path / "t.csv")
    assert catalog.table["image"].to_pylist() == ["img/0-0.png", "img/1-0.png"]
    assert "repeats an earlier row" in set_aside(catalog)


def _twins(folder: Path, twins: int, same_file: bool = False) -> Path:
    """Write a table of 3 products with 2 gallery images and 1 query; some queries are copies of a gallery image."""
    rows: list[list[object]] = []
    for index, (name, product) in enumerate(write_images(folder, 3, 3)):
        number, view = divmod(index, 3)
        if view == 2 and number < twins:
            copy = f"img/{number}-0.png" if same_file else name
            if not same_file:
                shutil.copyfile(folder / f"img/{number}-0.png", folder / name)
            name = copy
        rows.append([name, product, "query" if view == 2 else "gallery", "test"])
    write_table(folder / "t.csv", "image,product,role,split", rows)
    return folder / "t.csv"


@pytest.mark.parametrize("same_file", [False, True])
def test_queries_equal_to_a_gallery_image_are_set_aside(
    tmp_path: Path, same_file: bool, notes: pytest.LogCaptureFixture
) -> None:
    catalog = build(_twins(tmp_path / "shop", 2, same_file))
    assert len(catalog.select(role="query")) == 1
    assert len(catalog.select(role="gallery")) == 6
    assert set_aside(catalog).count("query equals gallery image") == 2
    assert "test queries that equal a gallery image: 2 of 3, set aside" in notes.text
    pairs = {tuple(row) for row in zip(catalog.table["sha256"].to_pylist(), catalog.roles.tolist(), strict=True)}
    assert len({sha256 for sha256, _ in pairs}) == len(pairs)


def test_no_query_left_stops(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test: all 3 queries equal a gallery image, byte for byte"):
        build(_twins(tmp_path / "shop", 3))
    assert not (tmp_path / "shop" / "catalog-t").exists()


def test_split_that_searches_itself_is_kept(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    rows = [[*pair, role, "test"] for pair in write_images(tmp_path, 3, 2) for role in ("query", "gallery")]
    write_table(tmp_path / "t.csv", "image,product,role,split", rows)
    assert build(tmp_path / "t.csv").roles.tolist() == ["query", "gallery"] * 6
    assert "queries that are the gallery images too: all 6" in notes.text
    single = [row for row in rows if "-0.png" in str(row[0])]  # no product has another image to find
    write_table(tmp_path / "single.csv", "image,product,role,split", single)
    with pytest.raises(UserError, match="all 3 queries equal a gallery image"):
        build(tmp_path / "single.csv")


def test_near_duplicates_of_queries_are_counted(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    table = _twins(tmp_path / "shop", 0)
    with Image.open(tmp_path / "shop/img/1-0.png") as image:
        image.resize((118, 88)).save(tmp_path / "shop/img/1-2.png")
    build(table)
    assert "test queries with a near-duplicate of their product in the gallery: 1 of 3" in notes.text
    assert "img/1-2.png and img/1-0.png" in notes.text


def test_labels_without_an_image_are_listed(tmp_path: Path) -> None:
    write_images(tmp_path / "shop", 1, 1)
    with tarfile.open(tmp_path / "shop" / "0.tar", "w") as tar:
        for name, data in (("1.cls", b"shoe"), ("2.cls", b"hat")):
            (tmp_path / name).write_bytes(data)
        tar.add(tmp_path / "shop/img/0-0.png", "1.png")
        tar.add(tmp_path / "1.cls", "1.cls")
        tar.add(tmp_path / "2.cls", "2.cls")
    config = CatalogConfig(reader="webdataset", root=str(tmp_path / "shop"), output=str(tmp_path / "c"))
    catalog = load_catalog(build_catalog(config))
    assert catalog.products.tolist() == ["shoe"]
    assert "0.tar/2,a label without an image" in set_aside(catalog)


def test_queries_cut_from_a_gallery_photo_are_counted(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, 2, 2)
    rows: list[list[object]] = []
    for product in range(2):
        rows.append([f"img/{product}-0.png", f"SKU{product}", "query", 0, 0, 60, 60])
        rows.append([f"img/{product}-{1 - product}.png", f"SKU{product}", "gallery", 40, 20, 60, 60])
    write_table(tmp_path / "t.csv", "image,product,role,box_x,box_y,box_w,box_h", rows)
    assert len(build(tmp_path / "t.csv")) == 4
    line = "test queries cut from a photograph that is in the gallery with another box: 1 (img/1-0.png)"
    assert line in notes.text


@pytest.mark.parametrize("share", ["validation", "test"])
def test_shares_are_checked_after_images_are_set_aside(tmp_path: Path, share: str) -> None:
    """Every product has one image of its own, and one that they all share."""
    rows: list[list[object]] = [list(pair) for pair in write_images(tmp_path, 8, 1)]
    Image.new("RGB", (60, 60), "red").save(tmp_path / "img/chart.png")
    write_table(tmp_path / "t.csv", "image,product", [*rows, *(["img/chart.png", row[1]] for row in rows)])
    with pytest.raises(UserError, match=rf"{share}: 0\.5 selects none of 8 products\. 0 products have two images"):
        build(tmp_path / "t.csv", **{share: 0.5})
    assert not (tmp_path / "catalog-t").exists()


def test_image_left_of_a_product_is_searched_for_if_another_remains(tmp_path: Path) -> None:
    """Roles are drawn from the images that stay, so no query loses its gallery image to a conflict."""
    rows: list[list[object]] = [list(pair) for pair in write_images(tmp_path, 12, 3)]
    Image.new("RGB", (60, 60), "red").save(tmp_path / "img/chart.png")
    write_table(tmp_path / "t.csv", "image,product", [*rows, *(["img/chart.png", f"SKU{n}"] for n in range(12))])
    held_out = build(tmp_path / "t.csv", test=0.5).select(split="test")
    for product in set(held_out.products.tolist()):
        assert set(held_out.roles[held_out.products == product].tolist()) == {"query", "gallery"}


def test_shares_are_checked_after_twins_are_set_aside(tmp_path: Path) -> None:
    """`--resplit` draws products whose roles make every query of a drawn split but one a twin."""
    rows: list[list[object]] = []
    for index, (name, product) in enumerate(write_images(tmp_path, 12, 2)):
        if index % 2:  # the query is a copy of the gallery image
            shutil.copyfile(tmp_path / f"img/{index // 2}-0.png", tmp_path / name)
        rows.append([name, product, "query" if index % 2 else "gallery"])
    write_images(tmp_path / "more", 1, 1)
    rows.append(["more/img/0-0.png", "lonely", "query"])  # no gallery image: no result of it can be right
    write_table(tmp_path / "t.csv", "image,product,role", rows)
    problem = r"all \d+ queries equal a gallery image|test: no product with a query and a gallery image is left"
    for seed in range(4):
        with pytest.raises(UserError, match=problem):
            build(tmp_path / "t.csv", test=0.5, resplit=True, seed=seed)
    assert not (tmp_path / "catalog-t").exists()
