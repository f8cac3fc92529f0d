from __future__ import annotations

import csv
import hashlib
from collections import Counter
from pathlib import Path

import pytest

import vpr.data.sample
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.splits import check_leaks
from vpr.imaging.decode import decode

FOLDER = Path(vpr.data.sample.__file__).parent


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    output = tmp_path_factory.mktemp("sample") / "catalog"
    return load_catalog(build_catalog(CatalogConfig(reader="sample", output=str(output))))


def test_size_and_counts(sample: Catalog) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 16_000_000
    assert sample.summary()["products"] == {"train": 437, "validation": 50, "test": 100}
    views = Counter(zip(sample.products.tolist(), sample.roles.tolist(), strict=True))
    assert all(views[product, "gallery"] == 4 for product in set(sample.products.tolist()))
    assert all(views[product, "query"] >= 6 for product in set(sample.products.tolist()))


def test_no_product_or_image_is_in_two_splits(sample: Catalog) -> None:
    train, validation, test = (sample.select(split=name) for name in ("train", "validation", "test"))
    check_leaks(train, validation)
    check_leaks(train, test)
    check_leaks(validation, test)


def test_images_decode_and_match_their_checksums(sample: Catalog) -> None:
    for row in range(0, len(sample), 997):
        assert decode(sample.path(row)).size == (128, 128)
        assert hashlib.sha256(sample.path(row).read_bytes()).hexdigest() == sample.table["sha256"][row].as_py()


def test_every_product_is_attributed(sample: Catalog) -> None:
    with (FOLDER / "ATTRIBUTION.csv").open(encoding="utf-8") as stream:
        rows = {f"home3d/{row['product']}": row for row in csv.DictReader(stream)}
    assert set(rows) == set(sample.products.tolist())
    assert {row["license"] for row in rows.values()} == {"CC0-1.0", "CC-BY-3.0"}
    assert all(row["creator"] for row in rows.values())
