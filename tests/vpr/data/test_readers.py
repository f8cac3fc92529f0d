from __future__ import annotations

import os
import resource
import tempfile
from itertools import product as product_of
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.readers import read_aicrowd, read_csv, read_folder, read_products10k


@pytest.fixture
def image(texture_folder: Path) -> bytes:
    return (texture_folder / "product-00" / "0.jpg").read_bytes()


def test_products10k_is_read_by_column_name(tmp_path: Path, image: bytes) -> None:
    for folder, names in (("train", ["1.jpg", "2.jpg"]), ("test", ["9.jpg"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(image + name.encode())  # no two with the same bytes
    (tmp_path / "train.csv").write_text("name,class,group\n1.jpg,7,360\n2.jpg,8,360\n")
    (tmp_path / "test_kaggletest.csv").write_text("Usage,class,name\nPublic,7,9.jpg\n")
    rows = list(read_products10k(tmp_path))
    assert [row["image"] for row in rows] == ["train/1.jpg", "train/2.jpg", "test/9.jpg"]
    assert [row["product"] for row in rows] == ["products10k/7", "products10k/8", "products10k/7"]
    assert [row["category"] for row in rows] == ["360", "360", ""]
    config = CatalogConfig(reader="products10k", root=str(tmp_path), output=str(tmp_path / "catalog"))
    assert len(load_catalog(build_catalog(config))) == 3


def test_aicrowd_keeps_boxes_and_roles(tmp_path: Path, image: bytes) -> None:
    for name in ("gallery/a.jpg", "queries/b.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(image)
    (tmp_path / "gallery.csv").write_text("seller_img_id,img_path,product_id\n1,gallery/a.jpg,5\n")
    header = "user_img_id,img_path,bbox_x,bbox_y,bbox_w,bbox_h,product_id\n"
    (tmp_path / "queries.csv").write_text(header + "1,queries/b.jpg,4,5,20,30,5\n")
    config = CatalogConfig(reader="aicrowd", root=str(tmp_path), output=str(tmp_path / "catalog"))
    catalog = load_catalog(build_catalog(config))
    assert catalog.roles.tolist() == ["gallery", "query"]
    assert catalog.products.tolist() == ["aicrowd/5"] * 2
    assert [catalog.box(row) for row in range(2)] == [None, (4.0, 5.0, 20.0, 30.0)]
    assert [row["product"] for row in read_aicrowd(tmp_path)] == ["aicrowd/5"] * 2


def test_csv_with_all_columns(tmp_path: Path) -> None:
    header = "product,image,role,split,category,box_x,box_y,box_w,box_h"
    (tmp_path / "t.csv").write_text(f"{header}\nshoe,a/1.jpg,query,test,feet,1,2,3,4\nhat,2.jpg,,,,,,,\n")
    first, second = read_csv(tmp_path / "t.csv")
    assert (first["role"], first["split"], first["category"]) == ("query", "test", "feet")
    assert first["box"] == {"x": 1.0, "y": 2.0, "w": 3.0, "h": 4.0}
    assert (second["role"], second["split"], second["box"]) == ("train", "", None)


def test_splits_of_tables_have_the_names_of_folders(tmp_path: Path) -> None:
    names = ["train", "Training", "val", "VALID", "validation", "dev", "test", "testing", ""]
    (tmp_path / "t.csv").write_text("\n".join(["image,product,split", *(f"a.jpg,1,{name}" for name in names)]))
    expected = ["train"] * 2 + ["validation"] * 4 + ["test"] * 2 + [""]
    assert [row["split"] for row in read_csv(tmp_path / "t.csv")] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,prod\na.jpg,1\n", "column 'product' is missing. Found: image, prod. Needed: image, product"),
        ("a;b\na.jpg;1\n", r"t.csv \(separated by ';'\): column 'image' is missing. Found: a, b. Needed"),
        ("x" * 300 + "\n", "Found: " + "x" * 200 + " .... Needed"),
        ("", "column 'image' is missing. Found: an empty first line"),
        ("image,product\n../../etc/passwd,1\n", "line 2: '../../etc/passwd' leads out of"),
        ("image,product\n/etc/passwd,1\n", "line 2: '/etc/passwd' leads out of .* with --image-root"),
        ("image,product\nloop/a.jpg,1\n", "line 2: 'loop/a.jpg' leads out of"),
        ("image,product,split\na.jpg,1,\nb.jpg,1,eval\n", "line 3: split 'eval' is not known. Use train, validation"),
        ("image,product,role\na.jpg,1,shop\n", "line 2: role 'shop' is not known. Use train, gallery, query"),
        ("image,product\na.jpg,Shoe, red\n", "line 2: more cells than columns"),
        ('image,product\na.jpg,"p1\nb.jpg,p2\nc.jpg,p3\n', "unexpected end of data"),
        ('image,product\na.jpg,"p1\nb.jpg,p2\nc.jpg,"\n', "line 4: 'product' has a line break. Look for a stray"),
        ('image,product\n"a' + "x" * (2 << 20) + '",1\n', "field larger than field limit"),
    ],
)
def test_broken_csv_names_file_line_and_fix(tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "t.csv"
    table.write_text(text)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=message) as caught:
        list(read_csv(table))
    assert str(table) in str(caught.value)


def test_folder_in_place_of_the_csv_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it is a folder\. Give the path of the CSV file"):
        list(read_csv(tmp_path))


def test_zero_byte_is_rejected(tmp_path: Path) -> None:
    """NumPy drops trailing zero bytes, so a held-out product could become equal to a training product."""
    (tmp_path / "t.csv").write_bytes(b"image,product,category\na.jpg,shoe,\nb.jpg,shoe\0,\n")
    with pytest.raises(UserError, match=r"t\.csv: line 3: a zero byte"):
        list(read_csv(tmp_path / "t.csv"))


_CELL = st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=("Cs",)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.from_regex(r"[a-z0-9 ,;'\"]{1,9}\.jpg", fullmatch=True), _CELL, _CELL), min_size=1))
def test_csv_written_by_pyarrow_is_read_exactly(cells: list[tuple[str, str, str]]) -> None:
    images, products, categories = zip(*cells, strict=True)
    table = pa.table({"category": categories, "product": products, "image": images})
    with tempfile.TemporaryDirectory() as folder:
        pyarrow.csv.write_csv(table, f"{folder}/t.csv")
        rows = list(read_csv(Path(folder) / "t.csv"))
    assert [(row["image"], row["product"], row["category"]) for row in rows] == cells


def test_text_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"image,product\ncaf\xe9.jpg,1\n")
    with pytest.raises(UserError, match="UTF-8"):
        list(read_csv(tmp_path / "t.csv"))


def test_link_out_of_the_folder_is_rejected(tmp_path: Path, image: bytes) -> None:
    (tmp_path / "secret.jpg").write_bytes(image)
    (tmp_path / "images" / "shoe").mkdir(parents=True)
    (tmp_path / "images" / "shoe" / "1.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(UserError, match="leads out of"):
        list(read_folder(tmp_path / "images"))


def test_links_are_resolved_before_the_check(tmp_path: Path, image: bytes) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "s.jpg").write_bytes(image)
    root = tmp_path / "images"
    (root / "real").mkdir(parents=True)
    (root / "real" / "1.jpg").write_bytes(image)
    (root / "real" / "2.jpg").symlink_to("1.jpg")
    (root / "real" / "out.jpg").symlink_to(tmp_path / "elsewhere" / "s.jpg")
    (root / "inner").symlink_to("real")
    (root / "outer").symlink_to(tmp_path / "elsewhere")
    valid = ["real/1.jpg", "real/2.jpg", "inner/1.jpg", "real/../real/1.jpg", "./real/1.jpg", "real/absent.jpg"]
    (root / "t.csv").write_text("".join(["image,product\n", *(f"{name},1\n" for name in valid)]))
    assert [row["image"] for row in read_csv(root / "t.csv")] == valid
    for name in ("real/out.jpg", "inner/out.jpg", "outer/s.jpg", "outer/absent.jpg", "../images2/1.jpg", ".."):
        (root / "t.csv").write_text(f"image,product\nreal/1.jpg,1\n{name},1\n")
        with pytest.raises(UserError, match="line 3: .* leads out of"):
            list(read_csv(root / "t.csv"))


def test_name_that_is_not_utf8_is_rejected(tmp_path: Path, image: bytes) -> None:
    (tmp_path / "shoe").mkdir()
    (tmp_path / "shoe" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(image)
    with pytest.raises(UserError, match=r"its name is not UTF-8\. Rename it"):
        list(read_folder(tmp_path))


@pytest.mark.parametrize("folders", [("training", "testing"), ("Training", "dev"), ("train", "dev", "testing")])
def test_other_names_of_split_folders(tmp_path: Path, image: bytes, folders: tuple[str, ...]) -> None:
    for folder in folders:
        (tmp_path / folder / f"of-{folder}").mkdir(parents=True)
        (tmp_path / folder / f"of-{folder}" / "1.jpg").write_bytes(image)
    known = {"t": "train", "d": "validation"} | {"testing": "test"}
    expected = {(f"of-{name}", known.get(name, known[name[0].lower()])) for name in folders}
    assert {(row["product"], row["split"]) for row in read_folder(tmp_path)} == expected


@pytest.mark.parametrize("inner", [("train", "test"), ("train",), ("train", "val", "shoes"), ("query", "gallery")])
def test_splits_in_the_only_folder_are_rejected(tmp_path: Path, image: bytes, inner: tuple[str, ...]) -> None:
    """All images would be of one product."""
    for folder in inner:
        (tmp_path / "images" / folder / "lamp").mkdir(parents=True)
        (tmp_path / "images" / folder / "lamp" / "1.jpg").write_bytes(image)
    with pytest.raises(UserError, match=r"its only folder 'images' would be one product, .*Give .*images as the root"):
        list(read_folder(tmp_path))


@pytest.mark.parametrize("names", [("lamp/1.jpg",), ("lamp/front/1.jpg", "lamp/test/1.jpg")])
def test_only_folder_without_splits_is_a_product(tmp_path: Path, image: bytes, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(image)
    assert {(row["product"], row["split"]) for row in read_folder(tmp_path)} == {("lamp", "")}


@pytest.mark.parametrize(("inner", "is_warned"), [(("train", "test"), True), (("front", "test"), False)])
def test_splits_inside_of_products_are_warned_of(
    tmp_path: Path, image: bytes, inner: tuple[str, str], is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for product, folder in product_of(("chair", "lamp"), inner):
        (tmp_path / product / folder).mkdir(parents=True)
        (tmp_path / product / folder / "1.jpg").write_bytes(image)
    assert {(row["product"], row["split"]) for row in read_folder(tmp_path)} == {("chair", ""), ("lamp", "")}
    assert ("folders of products are not splits (test, train in chair)" in caplog.text) == is_warned


def test_odd_names_are_read_and_line_breaks_rejected(tmp_path: Path, image: bytes) -> None:
    names = ["100% cotton", "a#b+c", "-dash", 'q"uote', "semi;colon, comma", "日本 😀", "[x]*?", "a\\b", "$HOME"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jpg").write_bytes(image)
    assert sorted(row["product"] for row in read_folder(tmp_path)) == sorted(names)
    (tmp_path / "new\nline").mkdir()
    (tmp_path / "new\nline" / "1.jpg").write_bytes(image)
    with pytest.raises(UserError, match=r"^'new\\nline/1\.jpg': it has a line break or a zero byte\. Rename"):
        list(read_folder(tmp_path))


def test_image_outside_product_folders_is_rejected(tmp_path: Path, image: bytes) -> None:
    (tmp_path / "1.jpg").write_bytes(image)
    with pytest.raises(UserError, match="is in no product's folder"):
        list(read_folder(tmp_path))


def test_missing_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither train\.csv nor test_kaggletest\.csv"):
        list(read_products10k(tmp_path))
    with pytest.raises(UserError, match=r"gallery\.csv: no such file"):
        list(read_aicrowd(tmp_path))


def test_absolute_path_is_accepted_below_the_root_only(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "t.csv").write_text(f"image,product\n{tmp_path}/in/a.jpg,1\n{tmp_path}/in/../b.jpg,1\n")
    rows = read_csv(tmp_path / "in" / "t.csv")
    assert next(rows)["image"] == "a.jpg"
    with pytest.raises(UserError, match="leads out of"):
        next(rows)


@pytest.mark.parametrize("table", ["train", "test_kaggletest"])
def test_one_products10k_table_is_enough(table: str, tmp_path: Path) -> None:
    (tmp_path / f"{table}.csv").write_text("name,class\n1.jpg,7\n")
    (row,) = read_products10k(tmp_path)
    assert row["image"] == ("train/1.jpg" if table == "train" else "test/1.jpg")


def test_csv_paths_stay_relative_after_loading(tmp_path: Path, image: bytes) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(image)
    (tmp_path / "images" / "t.csv").write_text("image,product\na.jpg,1\n")
    config = CatalogConfig(reader="csv", root=str(tmp_path / "images" / "t.csv"), output=str(tmp_path / "catalog"))
    assert load_catalog(build_catalog(config)).path(0).read_bytes() == image


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,product\n0.png," + "x" * (5 << 20) + "\n", "line 2: a row of more than 4194304 characters"),
        ("image,product\n0.png,a" + ',"\n"' * 1_200_000, "a row of more than 4194304 characters"),
        ("image,product," + ",".join(map(str, range(1000))) + "\n0.png,a\n", "more than 1000 columns"),
    ],
)
def test_too_long_rows_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_csv(tmp_path / "t.csv"))


def test_line_of_a_gigabyte_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("wb") as stream:
        stream.write(b"image,product\n0.png,")
        stream.truncate(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="a row of more than 4194304 characters"):
        list(read_csv(tmp_path / "t.csv"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_blank_lines_do_not_count_as_a_long_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,product\n" + ("0.png," + "x" * 1000 + "\n\n") * 5000 + "\n" * (5 << 20))
    assert len(list(read_csv(tmp_path / "t.csv"))) == 5000


@pytest.mark.parametrize("depth", [1, 2])
def test_products_in_subfolders_are_reported(
    depth: int, tmp_path: Path, image: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("Milch/Alpro", "Milch/Oatly", "Obst/Kiwi"):
        folder = tmp_path / (name if depth == 2 else name.replace("/", "-"))
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(image)
    list(read_folder(tmp_path))
    message = "the images of 2 of 2 products are in subfolders (Milch/Alpro). A product is the first folder:"
    assert (message in capsys.readouterr().err) == (depth == 2)
