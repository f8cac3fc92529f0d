from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pytest

from tests.catalogs import write_catalog
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog, load_catalog
from vpr.data.decisions import read_decisions, write_cleaned_catalog

# image, product, category, role, split
ROWS = [
    ("a1", "A", "lamps", "train", "train"),
    ("a2", "A", "lamps", "train", "train"),
    ("b1", "B", "chairs", "train", "train"),
    ("b2", "B", "chairs", "train", "train"),
    ("two words", "C c", "chairs", "train", "train"),
    ("t1", "T", "desks", "gallery", "test"),
    ("t2", "T", "desks", "query", "test"),
    ("u1", "U", "desks", "gallery", "test"),
    ("u2", "U", "desks", "query", "test"),
    ("twice", "A", "lamps", "train", "train"),
    ("twice", "B", "chairs", "train", "train"),
]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    names = ("image", "product", "category", "role", "split")
    rows = [{**dict(zip(names, row, strict=True)), "source": "csv", "sha256": row[0]} for row in ROWS]
    return load_catalog(write_catalog(tmp_path / "catalog", Catalog(pa.Table.from_pylist(rows, SCHEMA), tmp_path)))


def write_decisions(folder: Path, *rows: str, heading: str = "image,decision") -> Path:
    path = folder / "decisions.csv"
    path.write_text("\n".join([heading, *rows]) + "\n", encoding="utf-8")
    return path


def clean(catalog: Catalog, folder: Path, *rows: str, heading: str = "image,decision") -> dict[str, list[str]]:
    """Return product, category, role and split of each image of the cleaned catalogue."""
    write_cleaned_catalog(catalog, write_decisions(folder, *rows, heading=heading), str(folder / "cleaned"))
    cleaned = load_catalog(folder / "cleaned")
    names = ("product", "category", "role", "split")
    columns = zip(cleaned.table["image"].to_pylist(), *(cleaned.table[name].to_pylist() for name in names), strict=True)
    return {f"{image} {row[0]}" if image == "twice" else image: row for image, *row in columns}


def test_images_are_dropped_moved_and_merged(catalog: Catalog, tmp_path: Path) -> None:
    cleaned = clean(catalog, tmp_path, "a1,drop", "a2,move C c", "b1,merge C c", "two words,keep")
    assert "a1" not in cleaned
    assert cleaned["a2"] == ["C c", "chairs", "train", "train"]
    assert cleaned["b1"] == cleaned["b2"] == cleaned["twice C c"] == ["C c", "chairs", "train", "train"]
    assert cleaned["twice A"] == ["A", "lamps", "train", "train"]
    artifact = load_artifact(tmp_path / "cleaned", "catalog")
    assert artifact.card.metrics["changes"] == {"drop": 1, "move": 1, "merge": 3}
    assert artifact.card.metrics["changed_images"] == {"train": 5}
    assert artifact.card.metrics["set_aside"] == 1
    assert [parent.sha256 for parent in artifact.parents("catalog")] == [catalog.artifact.sha256]
    with artifact.file("changes.csv").open(newline="") as stream:
        changes = list(csv.reader(stream))
    assert changes[:3] == [
        ["image", "decision", "product", "new_product", "split", "new_split"],
        ["a1", "drop", "A", "", "train", ""],
        ["a2", "move", "A", "C c", "train", "train"],
    ]


def test_moved_image_takes_split_and_role_of_its_product(catalog: Catalog, tmp_path: Path) -> None:
    cleaned = clean(catalog, tmp_path, "a1,move T", "u1,merge A")
    assert cleaned["a1"] == ["T", "desks", "gallery", "test"]
    assert cleaned["u1"] == cleaned["u2"] == ["A", "lamps", "train", "train"]
    card = load_artifact(tmp_path / "cleaned").card
    assert card.metrics["changed_images"] == {"train": 3, "test": 3}


def test_image_moved_to_a_merged_product_follows_the_merge(catalog: Catalog, tmp_path: Path) -> None:
    assert clean(catalog, tmp_path, "a1,move B", "b1,merge C c")["a1"][0] == "C c"


def test_rows_that_become_equal_are_kept_once(catalog: Catalog, tmp_path: Path) -> None:
    cleaned = clean(catalog, tmp_path, "a1,merge B")
    assert [name for name in cleaned if name.startswith("twice")] == ["twice B"]
    assert load_catalog(tmp_path / "cleaned").table.num_rows == len(ROWS) - 1
    assert load_artifact(tmp_path / "cleaned").card.metrics["changes"] == {"merge": 2, "repeated": 1}


def test_column_product_selects_the_row_of_an_image(catalog: Catalog, tmp_path: Path) -> None:
    cleaned = clean(catalog, tmp_path, "twice,drop,A", heading="image,decision,product")
    assert [name for name in cleaned if name.startswith("twice")] == ["twice B"]


def test_same_decisions_are_up_to_date_and_others_are_applied_again(catalog: Catalog, tmp_path: Path) -> None:
    clean(catalog, tmp_path, "a1,drop")
    before = load_artifact(tmp_path / "cleaned").sha256
    clean(catalog, tmp_path, "a1,drop")
    assert load_artifact(tmp_path / "cleaned").sha256 == before
    assert "a2" not in clean(catalog, tmp_path, "a2,drop")


def test_cleaning_does_not_replace_the_catalogue_that_it_reads(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the output is also the input 'catalog'"):
        write_cleaned_catalog(catalog, write_decisions(tmp_path, "a1,drop"), str(tmp_path / "catalog"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["a1,remove"], r"line 2: decision 'remove' is not known\. Use keep, drop, move PRODUCT or merge PRODUCT\."),
        (["a1,move"], "line 2: decision 'move' is not known"),
        (["a1,drop B"], "line 2: decision 'drop B' is not known"),
        (["a1,keep", "a11,drop"], r"line 3: the catalogue has no image 'a11'\. Did you mean 'a1'\?"),
        (["a1,move Z"], r"line 2: the catalogue has no product 'Z'\. Correct the row\."),
        (["a1,move A"], "line 2: 'A' is the product of the image"),
        (["a1,drop", "a1,move B"], "line 3: the image has another decision, 'drop'"),
        (["a1,merge B", "a2,merge T"], "line 3: 'A' is also merged into 'B'"),
        (["a1,merge B", "b1,merge T"], "'B' is merged into 'T' and is a target too"),
        (["twice,drop"], "line 2: the image is listed for several products. Add a column 'product'"),
        (["a1,"], "line 2: no value for 'decision'"),
        (['a1,"move B', 'x"'], "line 3: 'decision' has a line break"),
    ],
)
def test_broken_decisions_are_rejected_with_their_line(
    rows: list[str], expected: str, catalog: Catalog, tmp_path: Path
) -> None:
    table = write_decisions(tmp_path, *rows)
    with pytest.raises(UserError, match=expected) as error:
        read_decisions(table, catalog)
    assert str(error.value).startswith(f"{table}: ")


def test_wrong_product_and_missing_columns_are_rejected(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 2: the image is not of product 'B'"):
        read_decisions(write_decisions(tmp_path, "a1,drop,B", heading="image,decision,product"), catalog)
    with pytest.raises(UserError, match=r"column 'decision' is missing\. Found: image, verdict\. Needed: image"):
        read_decisions(write_decisions(tmp_path, "a1,drop", heading="image,verdict"), catalog)
    with pytest.raises(UserError, match="no such file"):
        read_decisions(tmp_path / "absent.csv", catalog)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["t1,drop"], "product 'T' of the test split has queries but no gallery image left"),
        ([f"{image},drop" for image in dict.fromkeys(row[0] for row in ROWS) if image != "twice"], "drop every image"),
    ],
)
def test_catalogue_that_cannot_be_used_is_not_written(
    rows: list[str], expected: str, catalog: Catalog, tmp_path: Path
) -> None:
    if "every" in expected:
        rows = [f"{image},drop,{product}" for image, product, *_ in ROWS]
        table = write_decisions(tmp_path, *rows, heading="image,decision,product")
    else:
        table = write_decisions(tmp_path, *rows)
    with pytest.raises(UserError, match=expected):
        write_cleaned_catalog(catalog, table, str(tmp_path / "cleaned"))
    assert not (tmp_path / "cleaned").exists()


def test_dropping_a_query_with_its_gallery_is_accepted(catalog: Catalog, tmp_path: Path) -> None:
    cleaned = clean(catalog, tmp_path, "t1,drop", "t2,drop")
    assert not {"t1", "t2"} & set(cleaned)
