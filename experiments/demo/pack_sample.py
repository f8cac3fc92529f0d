"""Pack the embedded sample from a folder of ``home3d`` renders.

``python -m experiments.demo.pack_sample FOLDER`` writes ``shard-*.parquet`` and ``ATTRIBUTION.csv`` to
``vpr/data/sample``. The same folder gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import random
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import vpr.data.sample

SIDE = 128
QUALITY = 80
SHARDS = 4
TEST_PRODUCTS = 100
VALIDATION_PRODUCTS = 50
SPLIT_SEED = 7
GALLERY_VIEWS = 4
QUERY_VIEWS = 6
_SAMPLE = Path(vpr.data.sample.__file__).parent


def pack(folder: Path, target: Path = _SAMPLE) -> None:
    """Write the shards and the attribution of all products that have enough views.

    Args:
        folder: Folder of ``images.csv`` (path, product, category, role, view), ``ATTRIBUTION.csv`` and the images.
        target: Folder of the files to write.
    """
    products: dict[str, list[dict[str, str]]] = defaultdict(list)
    with (folder / "images.csv").open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            products[row["product"]].append(row)
    kept = sorted(name for name, rows in products.items() if _has_enough_views(rows))
    splits = split_products(kept)
    with ProcessPoolExecutor() as pool:
        for shard in range(SHARDS):
            rows = [row for name in kept[shard::SHARDS] for row in products[name]]
            images = list(pool.map(_encode, [folder / row["path"] for row in rows], chunksize=64))
            columns = {name: [row[name] for row in rows] for name in ("product", "category", "role")}
            table = pa.table({**columns, "split": [splits[row["product"]] for row in rows], "image": images})
            pq.write_table(table, target / f"shard-{shard}.parquet", compression="none", use_dictionary=False)
    _write_attribution(folder / "ATTRIBUTION.csv", target / "ATTRIBUTION.csv", set(kept))


def split_products(names: list[str]) -> dict[str, str]:
    """Split sorted names that a seed shuffles: 100 test, 50 validation, all others train."""
    order = sorted(names)
    random.Random(SPLIT_SEED).shuffle(order)
    splits = dict.fromkeys(order, "train")
    splits.update(dict.fromkeys(order[:TEST_PRODUCTS], "test"))
    splits.update(dict.fromkeys(order[TEST_PRODUCTS : TEST_PRODUCTS + VALIDATION_PRODUCTS], "validation"))
    return splits


def _has_enough_views(rows: list[dict[str, str]]) -> bool:
    roles = [row["role"] for row in rows]
    return roles.count("gallery") >= GALLERY_VIEWS and roles.count("query") >= QUERY_VIEWS


def _encode(path: Path) -> bytes:
    stream = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(
            stream, "WEBP", quality=QUALITY, method=6
        )
    return stream.getvalue()


def _write_attribution(source: Path, target: Path, kept: set[str]) -> None:
    with source.open(encoding="utf-8") as stream, target.open("w", newline="", encoding="utf-8") as out:
        reader = csv.DictReader(stream)
        writer = csv.DictWriter(out, reader.fieldnames or [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in reader if row["product"] in kept)


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
