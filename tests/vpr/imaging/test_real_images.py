from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.recall.baselines import colour_histogram, raw_pixels
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig
from vpr.retrieval.embeddings import score_split

pytestmark = pytest.mark.data


def test_grocery_images_are_searched_by_baselines(data_folder: Path, tmp_path: Path) -> None:
    """Read Grocery Store by CSV: phone images as queries, one clean image per product as gallery."""
    table = tmp_path / "grocery" / "images.csv"
    table.parent.mkdir()
    roles = {"val": "query", "iconic": "gallery"}
    with (data_folder / "grocery" / "images.csv").open() as source, table.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "product", "category", "role", "split"])
        for row in csv.DictReader(source):
            if row["split"] in roles:
                writer.writerow([row["path"], row["product"], row["category"], roles[row["split"]], "test"])
                target = table.parent / row["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((data_folder / "grocery" / row["path"]).read_bytes())
    config = CatalogConfig(reader="csv", root=str(table), output=str(tmp_path / "catalog"))
    catalog = load_catalog(build_catalog(config)).select(split="test")
    assert (len(catalog.select(role="query")), len(catalog.select(role="gallery"))) == (296, 81)
    colours, pixels = (score_split(catalog, embed(catalog)) for embed in (colour_histogram, raw_pixels))
    assert colours.recall_at_1 > pixels.recall_at_1 > 1 / 81
    assert colours.map == colours.map_at_1000
