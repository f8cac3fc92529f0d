from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.catalogs import write_catalog
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog, load_catalog, rows_to_table
from vpr.data.division import Shares, split_by_product
from vpr.data.readers import read_csv
from vpr.data.splits import check_leaks


def test_catalogue_is_loaded_and_selected(catalog: Catalog) -> None:
    assert catalog.table.schema.equals(SCHEMA)
    assert len(catalog) == 128
    assert {len(set(catalog.select(split=s).products)) for s in ("validation", "test")} == {4}
    gallery = catalog.select(split="test", role="gallery")
    assert len(gallery) == 16
    assert gallery.path(0).is_file()
    assert gallery.box(0) is None
    assert catalog.summary()["products"] == {"train": 8, "validation": 4, "test": 4}


def test_checksum_ignores_the_order_of_rows(catalog: Catalog) -> None:
    reversed_rows = Catalog(catalog.table.take(pa.array(np.arange(len(catalog))[::-1])), catalog.root)
    assert reversed_rows.sha256 == catalog.sha256
    assert catalog.select(split="test").sha256 != catalog.sha256


def test_unknown_role_is_rejected(catalog: Catalog) -> None:
    rows = catalog.table.to_pylist()[:1]
    rows[0]["role"] = "spectator"
    with pytest.raises(UserError, match="role 'spectator' is not known"):
        rows_to_table(rows)


@pytest.mark.slow
def test_200k_rows_take_seconds(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w") as stream:
        stream.write("image,product\n")
        stream.writelines(f"shelf-{row % 50}/{row}.jpg,shop/{row // 20}\n" for row in range(200_000))
    start = time.monotonic()
    rows = [{**row, "sha256": f"{number:064x}"} for number, row in enumerate(read_csv(tmp_path / "t.csv"))]
    built = Catalog(split_by_product(rows_to_table(rows), Shares(0.1, 0.1)).table, tmp_path)
    loaded = load_catalog(write_catalog(tmp_path / "catalog", built))
    train, test = loaded.select(split="train"), loaded.select(split="test")
    assert check_leaks(train, test) == {}
    assert loaded.summary()["images"] == {"train": 160_480, "validation": 19_600, "test": 19_920}
    assert loaded.summary()["sha256"] == built.sha256
    assert time.monotonic() - start < 60  # a bound against quadratic work and a call per row, not a benchmark


def test_table_with_other_columns_is_rejected(catalog: Catalog, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from vpr.artifacts.writer import write_artifact

    with write_artifact(tmp_path / "c", "catalog", {"root": "."}) as draft:
        pq.write_table(pa.table({"image": ["a"]}), draft.path / "catalog.parquet")
    with pytest.raises(UserError, match="not a usable catalog"):
        load_catalog(tmp_path / "c")


@pytest.mark.parametrize("damage", ["bytes", "text", "length"])
def test_damaged_table_is_rejected(catalog: Catalog, tmp_path: Path, damage: str) -> None:
    import pyarrow.parquet as pq

    from vpr.artifacts.writer import write_artifact

    with write_artifact(tmp_path / "c", "catalog", {"root": "."}) as draft:
        path = draft.path / "catalog.parquet"
        pq.write_table(catalog.table, path, use_dictionary=False, compression="none" if damage == "text" else "snappy")
        data, product = path.read_bytes(), catalog.table["product"][0].as_py().encode()
        broken = {
            "bytes": data[:200] + bytes(100) + data[300:],
            "text": data.replace(product, b"\xff" * len(product)),
            "length": data[:-8] + b"\xff\xff\xff\x7f" + data[-4:],
        }
        path.write_bytes(broken[damage])
    with pytest.raises(UserError, match="not a usable catalog"):
        load_catalog(tmp_path / "c")


@pytest.mark.parametrize("image", ["../a.png", "a/../../b.png", "/etc/a.png", ".."])
def test_image_paths_outside_the_root_are_rejected(catalog: Catalog, tmp_path: Path, image: str) -> None:
    column = catalog.table.schema.get_field_index("image")
    images = pa.array([image, *catalog.table["image"].to_pylist()[1:]], pa.string())
    path = write_catalog(tmp_path / "c", Catalog(catalog.table.set_column(column, "image", images), catalog.root))
    with pytest.raises(UserError, match="the path of an image leads out of its root"):
        load_catalog(path)


def test_card_without_root_is_rejected(catalog: Catalog, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from vpr.artifacts.writer import write_artifact

    with write_artifact(tmp_path / "c", "catalog", {}) as draft:
        pq.write_table(catalog.table, draft.path / "catalog.parquet")
    with pytest.raises(UserError, match="does not say where the images are"):
        load_catalog(tmp_path / "c")
