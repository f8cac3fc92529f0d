from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vpr.data.sample
from experiments.demo.pack_sample import SPLIT_SEED, pack, split_products

FOLDER = Path(vpr.data.sample.__file__).parent


def test_split_is_the_documented_one() -> None:
    tables = [pq.read_table(shard, columns=["product", "split"]) for shard in vpr.data.sample.SHARDS]
    splits = {row["product"]: row["split"] for table in tables for row in table.to_pylist()}
    assert splits == split_products(list(splits))
    assert f"random.Random({SPLIT_SEED})" in (FOLDER / "README.md").read_text()


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
