"""Tables of several kinds: separators, names of columns, paths, JSON lines and Parquet."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher.config import DataConfig
from teacher.data import build_data
from tests.vpr.data.shops import build, write_images, write_table
from vpr.common.errors import UserError
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig, ReadOptions
from vpr.data.readers import read_csv


@pytest.fixture
def pairs(tmp_path: Path) -> list[tuple[str, str]]:
    return write_images(tmp_path, 3, 2)


def _expect_all(table: Path, pairs: list[tuple[str, str]], **options: object) -> None:
    catalog = build(table, **options)
    assert list(zip(catalog.table["image"].to_pylist(), catalog.products.tolist(), strict=True)) == pairs
    assert all(catalog.path(row).is_file() for row in range(len(catalog)))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "header", ["image{}product", "Image{}PRODUCT", " image {}\u00a0product", "\ufeffimage{}product"]
)
def test_separators_and_case_of_the_header(
    tmp_path: Path, pairs: list[tuple[str, str]], separator: str, header: str
) -> None:
    rows: list[list[object]] = [list(pair) for pair in pairs]
    write_table(tmp_path / "t.csv", header.format(separator), rows, separator)
    _expect_all(tmp_path / "t.csv", pairs)


def test_other_names_are_suggested_and_mapped(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    rows: list[list[object]] = [[product, "x", name] for name, product in pairs]
    write_table(tmp_path / "t.csv", "Product_ID;product;Image_Path", rows, ";")
    with pytest.raises(UserError, match=r"separated by ';'.*Found: Product_ID, product, Image_Path.*image=Image_Path"):
        build(tmp_path / "t.csv")
    _expect_all(tmp_path / "t.csv", pairs, columns=("image=image_path", "product=product_id"))
    config = DataConfig(
        str(tmp_path / "data"), csv=(str(tmp_path / "t.csv"),), columns=("image=Image_Path", "product=Product_ID"),
        validation=0.34,
    )  # fmt: skip
    assert set(load_catalog(build_data(config)).products.tolist()) == {product for _, product in pairs}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("image",), "expected NAME=COLUMN"),
        (("imag=file",), "'imag' in 'imag=file' is not known. Did you mean image"),
        (("image=files",), "no column 'files' for image. Found: file, sku. Did you mean 'file'"),
        (("image=file", "image=sku"), "'image' is given twice"),
        (("image=file", "product=file"), "'file' is mapped to image and product"),
    ],
)
def test_broken_mapping_is_rejected(tmp_path: Path, columns: tuple[str, ...], message: str) -> None:
    (tmp_path / "t.csv").write_text("file,sku\na.jpg,1\n")
    with pytest.raises(UserError, match=message):
        list(read_csv(tmp_path / "t.csv", ReadOptions(columns=columns)))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,product,product", "2 columns are named 'product'"),
        ("image,Product,PRODUCT", "several columns are named 'product'"),
        ("image,product,box_x,box_y,box_w", "column 'box_h' is missing, but there is 'box_x'"),
    ],
)
def test_doubled_and_partial_columns_are_rejected(tmp_path: Path, header: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\na.jpg" + ",1" * header.count(",") + "\n")
    with pytest.raises(UserError, match=message):
        list(read_csv(tmp_path / "t.csv"))


def test_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",image,product,,\n0,a.jpg,shoe,,\n")
    assert [row["product"] for row in read_csv(tmp_path / "t.csv")] == ["shoe"]


def test_paths_below_an_image_root(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    (tmp_path / "tables").mkdir()
    forms = [lambda name: name, lambda name: name.replace("/", "\\"), lambda name: str((tmp_path / name).resolve())]
    for number, form in enumerate(forms):
        table = tmp_path / "tables" / f"{number}.csv"
        write_table(table, "image,product", [[form(name), product] for name, product in pairs])
        _expect_all(table, pairs, image_root=str(tmp_path))
    with pytest.raises(UserError, match=r"no such file, but line 2 of the table names it.*--image-root"):
        build(tmp_path / "tables" / "0.csv")
    with pytest.raises(UserError, match=r"leads out of .* --image-root"):
        build(tmp_path / "tables" / "2.csv")


@pytest.mark.parametrize("name", ["..\\..\\etc\\passwd", "\\etc\\passwd", "img\\..\\..\\x.jpg"])
def test_backslashes_do_not_lead_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "t.csv").write_text(f"image,product\n{name},1\n")
    with pytest.raises(UserError, match="line 2: .* leads out of"):
        list(read_csv(tmp_path / "t.csv"))


def test_names_in_another_unicode_form_are_found(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    decomposed = unicodedata.normalize("NFD", "img/\u00e9t\u00e9.png")
    (tmp_path / pairs[0][0]).rename(tmp_path / decomposed)
    composed = unicodedata.normalize("NFC", decomposed)
    write_table(tmp_path / "t.csv", "image,product", [[composed, "a"], *([name, "b"] for name, _ in pairs[1:])])
    assert build(tmp_path / "t.csv").path(0) == tmp_path / decomposed


def test_json_lines_and_parquet_equal_the_csv(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    boxes = [[1.0, 2.0, 30.0, 40.0] if index % 2 else None for index in range(len(pairs))]
    names, products = [name for name, _ in pairs], [int(product[3:]) for _, product in pairs]
    cells = [["", "", "", ""] if box is None else box for box in boxes]
    rows: list[list[object]] = [[n, p, *c] for n, p, c in zip(names, products, cells, strict=True)]
    write_table(tmp_path / "c.csv", "image,product,box_x,box_y,box_w,box_h", rows)
    records = [{"image": n, "Product": p, "bbox": b} for n, p, b in zip(names, products, boxes, strict=True)]
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    floats = [float(product) for product in products]  # as pandas writes a column with missing values
    pq.write_table(
        pa.table({"image": names, "product": floats, "bbox": boxes, "blob": [b"x"] * 6}), tmp_path / "p.parquet"
    )
    first, *others = (build(tmp_path / name).table.drop(["source"]) for name in ("c.csv", "j.jsonl", "p.parquet"))
    assert first["product"].to_pylist() == ["0", "0", "1", "1", "2", "2"]
    assert first["box"].null_count == 3
    assert all(other.equals(first) for other in others)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b"", "column 'image' is missing"),
        ("t.jsonl", b'{"image": "a.jpg", "product": "1"}\n{"image"\n', "line 2: .*Write one JSON object per line"),
        ("t.jsonl", b'{"image": "a.jpg", "product": "1"}\n[1]\n', "line 2: it is not an object"),
        ("t.jsonl", b'{"image": "a.jpg", "product": "1"}\n{"product": "1"}\n', "line 2: no value for 'image'"),
        ("t.jsonl", b'{"image": "a.jpg", "product": "\\ud800"}\n', "line 1: a value that is not text"),
        ("t.jsonl", b'{"image": "a.jpg", "product": "a\\u0000"}\n', "line 1: a value that is not text"),
        ("t.jsonl", b"[" * 100_000, "line 1: .*Write one JSON object per line"),
        ("t.jsonl", b'{"image": "a.jpg", "product": "1"}\n\xff\n', "Write one JSON object per line in UTF-8"),
        (
            "t.jsonl",
            b'{"image": "a.jpg", "product": "1", "product": "2"}\n',
            "line 1: the key 'product' is there twice",
        ),
        ("t.jsonl", b'{"image": "a.jpg", "product": ["1"]}\n', "line 1: 'product' is a list. Write it as text"),
        ("t.jsonl", b'{"image": "a.jpg", "product": 1, "split": [1]}\n', "line 1: 'split' is a list"),
        ("t.jsonl", b'{"image": {"bytes": 1}, "product": 1}\n', "line 1: 'image' is an object"),
        ("t.jsonl", b'{"image": "a.jpg", "product": 1, "bbox": {"x": 1}}\n', "line 1: 'bbox' is an object"),
        ("t.parquet", b"PAR1", "broken Parquet"),
    ],
)
def test_broken_tables_are_rejected(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_csv(tmp_path / name))


def test_images_without_a_row_are_counted(
    tmp_path: Path, pairs: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_table(tmp_path / "t.csv", "image,product", [list(pair) for pair in pairs[1:]])
    build(tmp_path / "t.csv")
    assert "images in the folders of the table without a label: 1 (img/0-0.png)" in caplog.text


@pytest.mark.parametrize("options", [{"columns": ("image=a",)}, {"image_root": "x"}, {"box_unit": "shares"}])
def test_options_of_other_readers_are_rejected(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="the folder reader has no use for it"):
        CatalogConfig("folder", "c", "root", **options)  # type: ignore[arg-type]


def test_catalogue_of_default_options_has_the_card_of_before(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    write_table(tmp_path / "t.csv", "image,product", [list(pair) for pair in pairs])
    artifact = build(tmp_path / "t.csv").artifact
    assert artifact is not None
    assert not set(artifact.card.config) & set(CatalogConfig.later_keys())


def test_keys_of_all_objects_are_columns(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    """Writers leave empty keys out, so the first object may lack the split of a later one."""
    records = [{"image": name, "product": product} for name, product in pairs]
    for record in records[4:]:
        record |= {"split": "test", "box": [1, 2, 30, 40]}  # type: ignore[dict-item]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    table = build(tmp_path / "t.jsonl").table
    assert table["split"].to_pylist() == ["train"] * 4 + ["test"] * 2
    assert table["box"].null_count == 4


@pytest.mark.parametrize("number", ["1e400", "1" + "0" * 400])
def test_huge_numbers_of_a_box_are_invalid(tmp_path: Path, pairs: list[tuple[str, str]], number: str) -> None:
    line = json.dumps({"image": pairs[0][0], "product": "a", "box": "BOX"}).replace('"BOX"', f"[1, 1, 5, {number}]")
    (tmp_path / "t.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"1 of 1 rows cannot be used .*box"):
        build(tmp_path / "t.jsonl")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_columns_that_are_not_read_are_listed(
    tmp_path: Path, pairs: list[tuple[str, str]], suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A split in a column of another name would be trained on without a word."""
    caplog.set_level(logging.INFO)
    logging.getLogger("vpr").propagate = True
    columns = {"image": [name for name, _ in pairs], "product": [product for _, product in pairs]}
    columns |= {"Subset": ["train"] * 4 + ["test"] * 2, "price": ["1"] * 6}
    table = tmp_path / f"t.{suffix}"
    records = pa.table(columns).to_pylist()
    if suffix == "csv":
        write_table(table, ",".join(columns), [list(record.values()) for record in records])
    elif suffix == "jsonl":
        table.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pq.write_table(pa.table(columns), table)
    build(table)
    assert "columns that are not read: Subset, price" in caplog.text
    assert "column 'Subset' may hold splits, which are not used: add --columns split=Subset" in caplog.text
    caplog.clear()
    assert set(build(table, columns=("split=Subset",)).table["split"].to_pylist()) == {"train", "test"}
    assert "may hold splits" not in caplog.text
    assert "columns that are not read: price" in caplog.text
