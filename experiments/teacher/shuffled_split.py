"""The division of the photographs that the recorded figures have: a seeded shuffle of the products.

`vpr catalog` divides by a hash of the product's id. Recorded models keep the division they were trained with.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from vpr.artifacts.writer import find_up_to_date, write_artifact
from vpr.data.catalog import SCHEMA, Catalog, image_root, load_catalog, rows_to_table, write_catalog_files
from vpr.data.config import ReadOptions
from vpr.data.intake import check_images
from vpr.data.readers import READERS


def build_shuffled_catalog(reader: str, root: str, output: str, validation: float, test: float, seed: int = 0) -> Path:
    """Write a catalogue with the card that `vpr catalog` gave it when it shuffled.

    Args:
        reader: Name of the reader.
        root: Folder of the images, or the CSV file.
        output: Path of the catalogue.
        validation: Share of the products for validation.
        test: Share of the products for test.
        seed: Seed of the shuffle.
    """
    values = {"reader": reader, "root": str(Path(root).resolve()), "validation": validation, "test": test}
    values |= {"seed": seed, "skip_unreadable": False}
    folder = image_root(reader, root)
    rows, _ = check_images(folder, list(READERS[reader](Path(root), ReadOptions())), skip_unreadable=False)
    catalog = Catalog(shuffle_split(rows_to_table(rows), validation, test, seed), folder)
    old = find_up_to_date(output, "catalog", values, [])
    if old is None or not load_catalog(old.path).table.equals(catalog.table):
        with write_artifact(output, "catalog", values) as draft:
            write_catalog_files(draft, catalog, [])
    return Path(output)


def shuffle_split(table: pa.Table, validation: float, test: float, seed: int) -> pa.Table:
    """Divide products with two or more images in shuffled order; the first half of each by path is its gallery."""
    paths: dict[str, list[str]] = {}
    for image, product in sorted(zip(table["image"].to_pylist(), table["product"].to_pylist(), strict=True)):
        paths.setdefault(product, []).append(image)
    order = np.array(sorted(name for name, images in paths.items() if len(images) > 1), dtype=np.str_)
    np.random.default_rng(seed).shuffle(order)
    tested, validated = round(test * len(paths)), round(validation * len(paths))
    splits = dict.fromkeys(order[:tested].tolist(), "test")
    splits |= dict.fromkeys(order[tested : tested + validated].tolist(), "validation")
    rows = []
    for row in table.to_pylist():
        split, images = splits.get(row["product"], "train"), paths[row["product"]]
        role = "gallery" if images.index(row["image"]) < len(images) / 2 else "query"
        rows.append({**row, "split": split, "role": "train" if split == "train" else role})
    return pa.Table.from_pylist(rows, schema=SCHEMA)
