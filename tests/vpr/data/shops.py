"""Small shops of generated images, for tests of readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig

SIZE = (120, 90)


def write_images(folder: Path, products: int, views: int) -> list[tuple[str, str]]:
    """Write ``img/PRODUCT-VIEW.png`` below a folder; return (name, product) of each. No two images are alike."""
    (folder / "img").mkdir(parents=True)
    rng = np.random.default_rng(0)
    found = []
    for product in range(products):
        for view in range(views):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
            coarse.resize(SIZE, Image.Resampling.BILINEAR).save(folder / f"img/{product}-{view}.png")
            found.append((f"img/{product}-{view}.png", f"SKU{product}"))
    return found


def write_table(table: Path, header: str, rows: list[list[object]], separator: str = ",") -> None:
    """Write a table whose header is text."""
    lines = [header, *(separator.join(map(str, row)) for row in rows)]
    table.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def build(table: Path, **options: object) -> Catalog:
    """Build the catalogue of a table next to it."""
    output = table.with_name(f"catalog-{table.stem}")
    config = CatalogConfig(reader="csv", root=str(table), output=str(output), **options)  # type: ignore[arg-type]
    return load_catalog(build_catalog(config))


def set_aside(catalog: Catalog) -> str:
    """Return the list of rows that were set aside."""
    assert catalog.artifact is not None
    return catalog.artifact.file("set_aside.csv").read_text(encoding="utf-8")
