"""Pack the golden images from the embedded sample.

``python -m experiments.serving.pack_golden`` writes the images and ``ATTRIBUTION.csv`` to ``vpr/data/golden``.
"""

from __future__ import annotations

import csv
import io
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

import vpr.data.golden
import vpr.data.sample

_SEED, _LICENCE = 7, "CC0-1.0"
_SIDE = 128  # of the sample's images
_ORIENTATION_TAG, _TURNED = 0x0112, 6  # EXIF: to be turned by 90 degrees clockwise
_QUALITY = 80


@dataclass
class Tiles:
    """Images of the sample's CC0 products in a seeded order, each used once."""

    queue: list[tuple[str, bytes]]
    used: list[str] = field(default_factory=list)

    def mosaic(self, columns: int, rows: int) -> Image.Image:
        """Return the next images side by side, RGB."""
        mosaic = Image.new("RGB", (columns * _SIDE, rows * _SIDE))
        for index in range(columns * rows):
            product, data = self.queue.pop()
            self.used.append(product)
            with Image.open(io.BytesIO(data)) as image:
                mosaic.paste(image.convert("RGB"), (index % columns * _SIDE, index // columns * _SIDE))
        return mosaic


def pack(folder: Path = vpr.data.golden.FOLDER) -> None:
    """Write the eight images and the attribution of the products in them."""
    attribution = Path(vpr.data.sample.__file__).parent / vpr.data.golden.ATTRIBUTION
    with attribution.open(encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        columns, rows = list(reader.fieldnames or []), {row["product"]: row for row in reader}
    tiles = read_tiles({product for product, row in rows.items() if row["license"] == _LICENCE})
    jpeg: dict[str, Any] = {"quality": _QUALITY}
    tiles.mosaic(5, 4).save(folder / "1-jpeg-420.jpg", subsampling="4:2:0", **jpeg)
    tiles.mosaic(5, 4).save(folder / "2-jpeg-444.jpg", subsampling="4:4:4", **jpeg)
    tiles.mosaic(3, 2).save(folder / "3-png.png", optimize=True)
    exif = Image.Exif()
    exif[_ORIENTATION_TAG] = _TURNED
    turned = tiles.mosaic(4, 5).transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "4-exif-turned.jpg", exif=exif, **jpeg)
    tiles.mosaic(5, 4).convert("L").save(folder / "5-grey.jpg", **jpeg)
    faded = tiles.mosaic(2, 2).crop((0, 0, 256, 192))
    faded.putalpha(_vignette(*faded.size))
    faded.save(folder / "6-alpha.png", optimize=True)
    tall = tiles.mosaic(2, 8).crop((32, 128, 224, 896))
    tall.save(folder / "7-tall.jpg", **jpeg)
    tiles.mosaic(1, 1).resize((40, 28), Image.Resampling.LANCZOS).save(folder / "8-tiny.png", optimize=True)
    with (folder / vpr.data.golden.ATTRIBUTION).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[product] for product in sorted(set(tiles.used)))


def read_tiles(products: set[str]) -> Tiles:
    """Return the first customer view and the first shop view of each product, in a seeded order."""
    views: dict[tuple[str, str], bytes] = {}
    for shard in vpr.data.sample.SHARDS:
        for row in pq.read_table(shard, columns=["product", "role", "image"]).to_pylist():
            if row["product"] in products:
                views.setdefault((row["product"], row["role"]), row["image"])
    queue = [(product, views[product, role]) for product, role in sorted(views)]
    random.Random(_SEED).shuffle(queue)
    return Tiles(queue)


def _vignette(width: int, height: int) -> Image.Image:
    """Return a mask that is opaque in the centre and transparent at the corners."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    return Image.fromarray((255 * np.clip(1.6 - 1.4 * np.hypot(x, y), 0, 1)).astype(np.uint8))


if __name__ == "__main__":
    pack()
