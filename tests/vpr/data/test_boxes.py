"""Boxes of every form, unit and frame give the same crop; implausible ones are rejected with the likely form."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.vpr.data.shops import SIZE, build, set_aside, write_images, write_table
from vpr.common.errors import UserError
from vpr.data.boxes import parse_box
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig
from vpr.imaging.decode import decode

WIDTH, HEIGHT = SIZE
BOXES = [(60, 20, 50, 60), (10, 40, 100, 50), (30, 30, 80, 40), (5, 5, 20, 30)]  # left, top, width, height in pixels
HEADERS = {"xywh": "box_x,box_y,box_w,box_h", "xyxy": "xmin,ymin,xmax,ymax", "cxcywh": "cx,cy,w,h"}


def _convert(box: tuple[float, ...], form: str, unit: str) -> list[object]:
    x, y, w, h = box
    numbers = {"xywh": (x, y, w, h), "xyxy": (x, y, x + w, y + h), "cxcywh": (x + w / 2, y + h / 2, w, h)}[form]
    return [n / side if unit == "shares" else n for n, side in zip(numbers, (WIDTH, HEIGHT) * 2, strict=True)]


def _write(folder: Path, header: str, boxes: list[list[object]]) -> Path:
    names = write_images(folder, len(boxes), 1)
    write_table(
        folder / "t.csv", f"image,product,{header}", [[*pair, *box] for pair, box in zip(names, boxes, strict=True)]
    )
    return folder / "t.csv"


def _boxes(catalog: Catalog) -> list[tuple[float, ...]]:
    return [tuple(round(side, 3) for side in catalog.box(row) or ()) for row in range(len(catalog))]


@pytest.mark.parametrize("unit", ["pixels", "shares"])
@pytest.mark.parametrize("form", list(HEADERS))
def test_every_form_gives_the_same_boxes(tmp_path: Path, form: str, unit: str) -> None:
    boxes = [_convert(box, form, unit) for box in BOXES]
    by_name = build(_write(tmp_path / "a", HEADERS[form], boxes), box_unit=unit)
    by_option = build(_write(tmp_path / "b", HEADERS["xywh"], boxes), box_form=form, box_unit=unit)
    assert _boxes(by_name) == _boxes(by_option) == BOXES


@pytest.mark.parametrize("unit", ["pixels", "shares"])
@pytest.mark.parametrize("form", ["xyxy", "cxcywh", "xywh"])
def test_wrong_reading_is_rejected_with_the_likely_one(tmp_path: Path, form: str, unit: str) -> None:
    table = _write(tmp_path / "a", HEADERS["xywh"], [_convert(box, form, unit) for box in BOXES])
    options = {} if (form, unit) != ("xywh", "pixels") else {"box_form": "xyxy"}
    with pytest.raises(UserError, match=rf"t\.csv: \d of 4 boxes do not fit .*--box-form {form} --box-unit {unit}"):
        build(table, **options)
    assert not (tmp_path / "a" / "catalog-t").exists()


@pytest.mark.parametrize(
    "header",
    [
        "bbox_x,bbox_y,bbox_w,bbox_h",
        "X,Y,W,H",
        "x,y,width,height",
        "left,top,width,height",
        "Bbox_X,bbox_y,bbox_w,bbox_h",
    ],
)
def test_known_columns_are_read(tmp_path: Path, header: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert _boxes(build(_write(tmp_path / "a", header, [list(box) for box in BOXES]))) == BOXES
    assert f"boxes: 4 from {header.lower().replace(',', ', ')}, read as xywh in pixels" in caplog.text


@pytest.mark.parametrize("cell", ['"[60, 20, 50, 60]"', '"60,20,50,60"', "60 20 50 60", '"(60, 20, 50, 60)"'])
def test_one_column_with_four_numbers(tmp_path: Path, cell: str) -> None:
    assert _boxes(build(_write(tmp_path / "a", "bbox", [[cell]]))) == [BOXES[0]]


def test_decimal_commas_and_missing_values_are_read() -> None:
    assert parse_box(["0,5", "1", "2,25", "3"]) == (0.5, 1.0, 2.25, 3.0)
    assert parse_box(["nan", "NaN", "", "None"]) is None
    assert parse_box(["[]"]) is None


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([1, 2, "x", 4], "is not four numbers"),
        ([1, 2, 0, 4], "has no area"),
        ([1, "nan", 3, 4], "is out of range"),
        ([1, 2, 3, 1e9], "is out of range"),
        ([1, "", 3, 4], "is not four numbers"),
        ([130, 10, 60, 60], r"\(130, 10, 60, 60\) is outside the 120x90 image"),
        ([-50, 10, 50, 60], "is outside the 120x90 image"),
    ],
)
def test_broken_boxes_stop_or_are_set_aside(tmp_path: Path, box: list[object], reason: str) -> None:
    boxes = [[1, 2, 30, 40]] * 12
    table = _write(tmp_path / "a", HEADERS["xywh"], [*boxes, box])
    with pytest.raises(UserError, match=rf"1 of 13 rows cannot be used \(line 14 \(img/12-0\.png\): box .*{reason}"):
        build(table)
    catalog = build(table, skip_invalid_rows=True)
    assert len(catalog) == 12
    assert set_aside(catalog).count("img/12-0.png,") == 1


def test_boxes_that_reach_out_are_counted_and_clipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    catalog = build(_write(tmp_path / "a", HEADERS["xywh"], [[1, 2, 30, 40]] * 11 + [[90, 10, 60, 60]]))
    assert "boxes that reach out of their image and are clipped: 1 (line 13 (img/11-0.png))" in caplog.text
    assert decode(catalog.path(11), catalog.box(11)).size == (30, 60)


def _turned(folder: Path, orientation: int, box: tuple[int, int, int, int]) -> Path:
    """Write an image whose red rectangle is ``box`` as stored, and a table with that box."""
    (folder / "img").mkdir(parents=True)
    x, y, w, h = box
    pixels = np.full((120, 90, 3), 230, dtype=np.uint8)
    pixels[y : y + h, x : x + w] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(folder / "img/query.png", exif=exif)
    Image.fromarray(pixels[:100]).save(folder / "img/gallery.png")
    rows = [["img/query.png", "a", "query", *box], ["img/gallery.png", "a", "gallery", "", "", "", ""]]
    write_table(folder / "t.csv", "image,product,role,box_x,box_y,box_w,box_h", rows)
    return folder / "t.csv"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_the_stored_image_are_turned_with_it(tmp_path: Path, orientation: int) -> None:
    catalog = build(_turned(tmp_path / "a", orientation, (10, 70, 30, 20)), box_frame="stored")
    crop = np.asarray(decode(catalog.path(0), catalog.box(0)))
    assert sorted(crop.shape[:2]) == [20, 30]
    assert np.unique(crop.reshape(-1, 3), axis=0).tolist() == [[250, 0, 0]]


@pytest.mark.parametrize(("frame", "box"), [("stored", (10, 70, 30, 20)), ("upright", (30, 10, 20, 30))])
def test_boxes_of_a_turned_tiff(tmp_path: Path, frame: str, box: tuple[int, int, int, int]) -> None:
    """Pillow turns a TIFF itself. Its size was turned once more, so that boxes seemed to be outside (Pillow#7381)."""
    table = _turned(tmp_path / "a", 6, (10, 70, 30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "a/img/query.png").save(tmp_path / "a/img/query.tif", exif=exif)
    table.write_text(
        table.read_text().replace("query.png", "query.tif").replace("10,70,30,20", ",".join(map(str, box)))
    )
    catalog = build(table, box_frame=frame)
    crop = np.asarray(decode(catalog.path(0), catalog.box(0)))
    assert crop.shape[:2] == (30, 20)
    assert np.unique(crop.reshape(-1, 3), axis=0).tolist() == [[250, 0, 0]]


@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_box_of_a_full_turned_image_is_none(tmp_path: Path, frame: str) -> None:
    table = _turned(tmp_path / "a", 6, (0, 0, 90, 120))
    table.write_text(table.read_text().replace("0,0,90,120", "0,0,90,120" if frame == "stored" else "0,0,120,90"))
    assert build(table, box_frame=frame).box(0) is None


def test_frame_that_does_not_fit_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 1 boxes do not fit .* upright image.*with --box-frame stored"):
        build(_turned(tmp_path / "a", 6, (10, 70, 30, 30)))


@pytest.mark.parametrize("frame", ["auto", "upright"])
def test_boxes_of_turned_images_are_reported(tmp_path: Path, frame: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    catalog = build(_turned(tmp_path / "a", 6, (10, 10, 30, 30)), box_frame=frame)
    assert _boxes(catalog)[0] == (10, 10, 30, 30)
    assert "boxes of images with an EXIF orientation: 1 (line 2 (img/query.png)), read in the upright" in caplog.text
    assert ("give --box-frame stored" in caplog.text) == (frame == "auto")


def test_aicrowd_boxes_are_about_the_stored_image(tmp_path: Path) -> None:
    _turned(tmp_path / "a", 6, (10, 70, 30, 20))
    write_table(tmp_path / "a/gallery.csv", "img_path,product_id", [["img/gallery.png", "a"]])
    header = "img_path,product_id,bbox_x,bbox_y,bbox_w,bbox_h"
    write_table(tmp_path / "a/queries.csv", header, [["img/query.png", "a", 10, 70, 30, 20]])
    config = CatalogConfig(reader="aicrowd", root=str(tmp_path / "a"), output=str(tmp_path / "c"))
    catalog = load_catalog(build_catalog(config)).select(role="query")
    crop = np.asarray(decode(catalog.path(0), catalog.box(0)))
    assert np.unique(crop.reshape(-1, 3), axis=0).tolist() == [[250, 0, 0]]
