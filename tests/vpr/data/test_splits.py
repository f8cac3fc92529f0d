from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import SCHEMA, Catalog, load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.splits import check_leaks, find_leaks


def test_leaks_of_products_and_images_are_rejected(catalog: Catalog) -> None:
    check_leaks(catalog.select(split="train"), catalog.select(split="test"))
    with pytest.raises(UserError, match="leak: 4 products are trained and scored: .* rerun `vpr catalog`"):
        check_leaks(catalog, catalog.select(split="test"))
    leaks = check_leaks(catalog, catalog.select(split="test"), allow=True)
    assert {key: value["count"] for key, value in leaks.items()} == {"products": 4, "images": 32}
    assert set(leaks["products"]["first"]) <= set(catalog.select(split="test").products)
    assert all(catalog.root.joinpath(image).is_file() for image in leaks["images"]["first"])
    renamed = [{**row, "product": "other"} for row in catalog.select(split="test").table.to_pylist()]
    other_names = Catalog(pa.Table.from_pylist(renamed, schema=SCHEMA), catalog.root)
    with pytest.raises(UserError, match=r"leak: 32 images \(same bytes\) are trained and scored"):
        check_leaks(other_names, catalog.select(split="test"))
    assert list(check_leaks(other_names, catalog.select(split="test"), allow=True)) == ["images"]


def test_warning_of_an_allowed_leak_names_products(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "product": "p", "sha256": str(i)} for i, row in enumerate(catalog.table.to_pylist())]
    leaking = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), catalog.root)
    with caplog.at_level("WARNING", logger="vpr"):
        assert len(find_leaks(leaking, allow=True)) == 3
    assert "train and validation share 1 products (p). The card records it." in caplog.text


def test_remedy_of_a_product_in_two_splits_works(tmp_path: Path, texture_folder: Path) -> None:
    """A data set with the same products in each split, as data sets for classification have."""
    for split in ("train", "val", "test"):
        for product in range(12):
            source = texture_folder / f"product-{product:02d}"
            for view in range(2):
                target = tmp_path / "shop" / split / f"p{product}" / f"{view}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                shift = 2 * ("train", "val", "test").index(split)
                target.write_bytes((source / f"{view + shift}.jpg").read_bytes())
    config = CatalogConfig("folder", str(tmp_path / "catalog"), str(tmp_path / "shop"))
    with pytest.raises(UserError, match="12 products are trained and scored: .* --resplit, --validation and --test"):
        find_leaks(load_catalog(build_catalog(config)), allow=False)
    config = replace(config, resplit=True, validation=0.25, test=0.25, seed=2)
    divided = load_catalog(build_catalog(config))
    assert find_leaks(divided, allow=False) == {}
    assert all(divided.summary()["products"].values())
    assert len(divided) == 72


def test_products_that_become_scored_are_reported(
    tmp_path: Path, texture_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CatalogConfig("folder", str(tmp_path / "c"), str(texture_folder), validation=0.25, test=0.25, seed=35)
    old = load_catalog(build_catalog(config))
    with caplog.at_level("WARNING", logger="vpr"):
        new = load_catalog(build_catalog(replace(config, seed=1)))
    trained = set(old.select(split="train").products)
    moved = trained & {*new.select(split="validation").products, *new.select(split="test").products}
    assert f"the catalogue that is replaced had {len(moved)} products (" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="vpr"):
        build_catalog(replace(config, seed=1, validation=0.3))
    assert (len(caplog.records) == 0) == (set(new.select(split="train").products) <= _trained(config.output))


def _trained(path: str) -> set[str]:
    return set(load_catalog(path).select(split="train").products)
