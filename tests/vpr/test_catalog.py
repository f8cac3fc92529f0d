from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpr.artifact import load_artifact
from vpr.catalog import (
    SCHEMA,
    Catalog,
    CatalogConfig,
    build_catalog,
    check_leaks,
    load_catalog,
    merge,
    split_by_product,
    table_of,
)
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
    assert len(tests) <= round(test * len(counts))


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
    assert "a/2.jpg: not a picture" in built.file("set_aside.csv").read_text()


def test_leaks_of_products_and_of_bytes_are_refused(catalog: Catalog) -> None:
    check_leaks(catalog.select(split="train"), catalog.select(split="test"))
    with pytest.raises(UserError, match="leak: 4 products are both trained and scored"):
        check_leaks(catalog, catalog.select(split="test"))
    renamed = [{**row, "product": "other"} for row in catalog.select(split="test").table.to_pylist()]
    again = Catalog(pa.Table.from_pylist(renamed, schema=SCHEMA), catalog.root)
    with pytest.raises(UserError, match=r"leak: 32 pictures \(same bytes\) are both"):
        check_leaks(again, catalog.select(split="test"))


def test_merging_leaves_out_repeated_bytes_and_says_which(catalog: Catalog) -> None:
    test = catalog.select(split="test")
    table, repeated = merge([catalog, test])
    assert table.num_rows == len(catalog)
    assert len(repeated) == len(test)
    assert all(left == kept for left, kept in repeated)


def test_shares_that_leave_no_training_are_refused() -> None:
    with pytest.raises(UserError, match="together less than 1"):
        split_by_product(table_of(_rows([2, 2])), 0.5, 0.5, 0)


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
