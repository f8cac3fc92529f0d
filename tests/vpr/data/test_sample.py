from __future__ import annotations

import csv
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vpr.data.sample
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.sample.pack import SPLIT_SEED, pack, split_products
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


def test_split_is_the_documented_one(sample: Catalog) -> None:
    names = [product.removeprefix("home3d/") for product in set(sample.products.tolist())]
    documented = {f"home3d/{name}": split for name, split in split_products(names).items()}
    assert dict(zip(sample.products.tolist(), sample.table["split"].to_pylist(), strict=True)) == documented
    assert f"random.Random({SPLIT_SEED})" in (FOLDER / "README.md").read_text()


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


def test_packing_is_deterministic_and_filters_views(tmp_path: Path) -> None:
    folder, rng = tmp_path / "renders", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines, credits = ["path,product,category,role,view"], ["product,name,creator,license"]
    for product in range(13):
        credits.append(f"p{product:03d},Chair,Someone,CC0-1.0")
        for view in range(9 if product == 0 else 10):
            role = "gallery" if view < 4 else "query"
            lines.append(f"images/{product}-{view}.jpg,p{product:03d},Office,{role},{view}")
            Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / lines[-1].split(",")[0])
    (folder / "images.csv").write_text("\n".join(lines))
    (folder / "ATTRIBUTION.csv").write_text("\n".join(credits))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pack(folder, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["ATTRIBUTION.csv", *(f"shard-{number}.parquet" for number in range(4))]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    shards = [pq.read_table(tmp_path / "a" / name) for name in names[1:]]
    products = [set(shard["product"].to_pylist()) for shard in shards]
    assert sum(map(len, products)) == len(set().union(*products)) == 12
    assert "p000" not in set().union(*products)
    assert "p000" not in (tmp_path / "a" / "ATTRIBUTION.csv").read_text()


@pytest.mark.slow
@pytest.mark.data
def test_packing_again_gives_the_same_images(data_folder: Path, tmp_path: Path) -> None:
    pack(data_folder / "home3d", tmp_path)
    for shard in vpr.data.sample.SHARDS:
        assert pq.read_table(tmp_path / shard.name).equals(pq.read_table(shard))
    assert (tmp_path / "ATTRIBUTION.csv").read_bytes() == (FOLDER / "ATTRIBUTION.csv").read_bytes()
