from __future__ import annotations

import csv
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.catalogs import write_catalog
from vpr.artifact import load_artifact
from vpr.catalog import SCHEMA, Catalog, load_catalog, table_of
from vpr.errors import UserError
from vpr.ingest import CatalogConfig, build_catalog
from vpr.readers import read_csv
from vpr.splits import check_leaks, split_by_product


def _rows(counts: list[int]) -> list[dict[str, object]]:
    fixed = {"category": "", "role": "train", "split": "train", "box": None, "source": "made"}
    return [
        {**fixed, "image": f"{p}/{i}.jpg", "product": f"p{p}", "sha256": f"{p}-{i}"}
        for p, count in enumerate(counts)
        for i in range(count)
    ]


@settings(max_examples=40, deadline=None)
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


def _split_by_a_plain_loop(
    rows: list[dict[str, object]], validation: float, test: float, seed: int
) -> list[dict[str, object]]:
    pictures: dict[object, list[dict[str, object]]] = {}
    for row in sorted(rows, key=lambda row: (row["product"], row["image"], str(row["box"]))):
        pictures.setdefault(row["product"], []).append(row)
    names = np.array([name for name, group in pictures.items() if len(group) > 1], dtype=np.str_)
    np.random.default_rng(seed).shuffle(names)
    tests, validations = round(test * len(pictures)), round(validation * len(pictures))
    split = dict.fromkeys(names.tolist()[:tests], "test")
    split |= dict.fromkeys(names.tolist()[tests : tests + validations], "validation")
    changed = {}
    for name, group in pictures.items():
        for number, row in enumerate(group):
            role = row["role"]
            if name in split and role == "train":
                role = "gallery" if number < len(group) / 2 else "query"
            changed[id(row)] = {**row, "split": split.get(name, "train"), "role": role}
    return [changed[id(row)] for row in rows]


@settings(max_examples=60, deadline=None)
@given(
    made=st.lists(
        st.tuples(
            st.sampled_from(["", "a", "b", "c", "é", "aa", "B"]),
            st.sampled_from(["1", "10", "2", "é"]),
            st.sampled_from(["train", "train", "gallery", "query"]),
            st.sampled_from([None, 1.0, 10.0, 9.0]),
        ),
        min_size=8,
        max_size=40,
    ),
    seed=st.integers(0, 3),
)
def test_splits_equal_a_plain_loop(made: list[tuple[str, str, str, float | None]], seed: int) -> None:
    fixed = {"category": "", "split": "train", "source": "made"}
    rows: list[dict[str, object]] = [
        {**fixed, "product": product, "image": image, "role": role, "sha256": str(number)}
        | {"box": None if left is None else {"x": left, "y": 0.0, "w": 1.0, "h": 1.0}}
        for number, (product, image, role, left) in enumerate(made)
    ]
    products = [row["product"] for row in rows]
    assume(sum(products.count(name) > 1 for name in set(products)) >= 4)
    validation = test = 1.5 / len(set(products))
    found = split_by_product(table_of(rows), validation, test, seed).to_pylist()
    assert found == _split_by_a_plain_loop(rows, validation, test, seed)


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


def test_files_that_are_no_pictures_by_name_are_listed_and_the_catalogue_itself_is_not(
    texture_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    shutil.copytree(texture_folder / "product-00", root / "shoe")
    for name in ("shoe/notes.txt", "shoe/1.heic", "README"):
        (root / name).write_bytes(b"?")
    config = CatalogConfig(reader="folder", root=str(root), output=str(root / "catalog"))
    first = load_artifact(build_catalog(config))
    with first.file("set_aside.csv").open(newline="") as stream:
        listed = list(csv.reader(stream))[1:]
    assert listed == [[name, "unknown suffix"] for name in ("README", "shoe/1.heic", "shoe/notes.txt")]
    assert first.card.metrics["set_aside"] == 3
    assert load_artifact(build_catalog(config)).sha256 == first.sha256


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
    found = check_leaks(catalog, catalog.select(split="test"), allow=True)
    assert {key: value["count"] for key, value in found.items()} == {"products": 4, "pictures": 32}
    assert set(found["products"]["first"]) <= set(catalog.select(split="test").products)
    assert all(catalog.root.joinpath(image).is_file() for image in found["pictures"]["first"])
    renamed = [{**row, "product": "other"} for row in catalog.select(split="test").table.to_pylist()]
    again = Catalog(pa.Table.from_pylist(renamed, schema=SCHEMA), catalog.root)
    with pytest.raises(UserError, match=r"leak: 32 pictures \(same bytes\) are both"):
        check_leaks(again, catalog.select(split="test"))
    assert list(check_leaks(again, catalog.select(split="test"), allow=True)) == ["pictures"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation": -1.0}, r"validation -1\.0 and test 0\.0: shares"),
        ({"test": float("nan")}, r"validation 0\.0 and test nan: shares"),
        ({"validation": float("inf")}, "validation inf"),
        ({"seed": -1}, "seed: -1: give 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CatalogConfig(reader="folder", root="x", output="y", **values)


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


def test_two_hundred_thousand_rows_are_read_split_written_and_loaded_in_seconds(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w") as stream:
        stream.write("image,product\n")
        stream.writelines(f"shelf-{row % 50}/{row}.jpg,shop/{row // 20}\n" for row in range(200_000))
    begun = time.monotonic()
    rows = [{**row, "sha256": f"{number:064x}"} for number, row in enumerate(read_csv(tmp_path / "t.csv"))]
    made = Catalog(split_by_product(table_of(rows), 0.1, 0.1, 0), tmp_path)
    loaded = load_catalog(write_catalog(tmp_path / "catalog", made))
    train, test = loaded.select(split="train"), loaded.select(split="test")
    assert check_leaks(train, test) == {}
    assert loaded.summary()["pictures"] == {"train": 160_000, "validation": 20_000, "test": 20_000}
    assert loaded.summary()["sha256"] == made.sha256
    assert time.monotonic() - begun < 60  # a bound against quadratic work and a call per row, not a benchmark


def test_a_catalogue_of_another_form_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from vpr.artifact import write_artifact

    with write_artifact(tmp_path / "c", "catalog", {"root": "."}) as draft:
        pq.write_table(pa.table({"image": ["a"]}), draft.path / "catalog.parquet")
    with pytest.raises(UserError, match="is no usable catalog"):
        load_catalog(tmp_path / "c")


@pytest.mark.parametrize("damage", ["piece", "text", "length"])
def test_a_table_that_was_written_wrong_is_refused_in_a_line(catalog: Catalog, tmp_path: Path, damage: str) -> None:
    import pyarrow.parquet as pq

    from vpr.artifact import write_artifact

    with write_artifact(tmp_path / "c", "catalog", {"root": "."}) as draft:
        path = draft.path / "catalog.parquet"
        pq.write_table(catalog.table, path, use_dictionary=False, compression="none" if damage == "text" else "snappy")
        data, product = path.read_bytes(), catalog.table["product"][0].as_py().encode()
        broken = {
            "piece": data[:200] + bytes(100) + data[300:],
            "text": data.replace(product, b"\xff" * len(product)),
            "length": data[:-8] + b"\xff\xff\xff\x7f" + data[-4:],
        }
        path.write_bytes(broken[damage])
    with pytest.raises(UserError, match="is no usable catalog"):
        load_catalog(tmp_path / "c")


@pytest.mark.parametrize("image", ["../a.png", "a/../../b.png", "/etc/a.png", ".."])
def test_a_table_whose_pictures_lie_elsewhere_is_refused(catalog: Catalog, tmp_path: Path, image: str) -> None:
    place = catalog.table.schema.get_field_index("image")
    images = pa.array([image, *catalog.table["image"].to_pylist()[1:]], pa.string())
    made = write_catalog(tmp_path / "c", Catalog(catalog.table.set_column(place, "image", images), catalog.root))
    with pytest.raises(UserError, match="a picture's path leads out of its root"):
        load_catalog(made)


def test_a_card_that_does_not_say_where_the_pictures_are_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from vpr.artifact import write_artifact

    with write_artifact(tmp_path / "c", "catalog", {}) as draft:
        pq.write_table(catalog.table, draft.path / "catalog.parquet")
    with pytest.raises(UserError, match="does not say where the pictures are"):
        load_catalog(tmp_path / "c")
