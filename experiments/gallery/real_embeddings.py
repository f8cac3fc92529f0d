"""Statistics of real embeddings next to those of synthetic ones (``make figures TOPIC=gallery PARTS="embeddings"``)."""

from __future__ import annotations

import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from experiments.figures import Row, record
from experiments.gallery.embedding_statistics import Images, measure_statistics, read_images, statistics_row
from experiments.gallery.synthetic_embeddings import SyntheticProducts, SyntheticSource
from experiments.teacher.imagenet_weights import embed_untrained, find_checkpoint, imagenet_tower
from export.config import EmbedConfig
from export.embed import embed_catalog
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA, Catalog

log = get_logger(__name__)

_FOLDER = Path("runs/figures-gallery")
_DEMO = Path("runs/demo")
_IMAGES = 10  # of a product of the photographs
# The test split of Stanford Online Products has 60,502 images of 11,316 products. Ermolov et al. ("Hyperbolic Vision
# Transformers", CVPR 2022) report a recall@1 of .859 in it, for a fine-tuned ViT-S.
_SEARCH_PRODUCTS, _SEARCH_IMAGES = 11_316, 5


def demo_images(model: str) -> Images:
    """Embed the test split of the demo, which no model of it has seen.

    Raises:
        UserError: ``make demo`` has not run.
    """
    if not (_DEMO / model).is_dir():
        raise UserError(f"{_DEMO / model}: it does not exist. Run `make demo`.")
    output = str(_FOLDER / f"{model}-vectors")
    vectors = embed_catalog(EmbedConfig(str(_DEMO / model), str(_DEMO / "catalog"), output, split="test"))
    return read_images(str(vectors), "test")


def grocery_images(data: Path, size: int = 0) -> Images:
    """Embed photographs of groceries, ten of each product at most, by EfficientNet-Lite with its ImageNet weights."""
    with (data / "grocery" / "images.csv").open(encoding="utf-8", newline="") as stream:
        read = [row for row in csv.DictReader(stream) if row["split"] == "train"]
    seen: Counter[str] = Counter()
    rows = []
    for row in read:
        seen[row["product"]] += 1
        if seen[row["product"]] <= _IMAGES:
            rows.append({"image": row["path"], **{key: row[key] for key in ("product", "category")}})
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), data / "grocery")
    vectors = embed_untrained(imagenet_tower(size, _FOLDER / "weights"), catalog)
    products, categories = (np.array([row[name] for row in rows]) for name in ("product", "category"))
    return Images(vectors, products, categories, np.zeros(len(rows), bool))


def synthetic_images(made: SyntheticProducts, count: int, roles: tuple[str, ...]) -> Images:
    """Return ``count`` synthetic products; with one role only, every image searches all others."""
    blocks = list(SyntheticSource(made).blocks(0, count, roles))
    categories = np.repeat(np.concatenate([block[1] for block in blocks]), len(roles)).astype(np.str_)
    products = np.repeat(np.arange(count), len(roles)).astype(np.str_)
    is_query = np.tile((np.array(roles) == "query") & (len(set(roles)) > 1), count)
    return Images(np.concatenate([block[0] for block in blocks]), products, categories, is_query)


def measure_embeddings() -> None:
    """Record the statistics of the demo's models, of photographs if they are there, and of synthetic products."""
    measured = {f"demo {model}, test split": demo_images(model) for model in ("teacher", "student")}
    if (data := os.environ.get("VPR_DATA")) and find_checkpoint(0):
        measured["EfficientNet-Lite0 (ImageNet), groceries"] = grocery_images(Path(data))
    else:
        log.info("VPR_DATA is not set, or `make photos-weights` has not run: photographs are left out")
    few = SyntheticProducts(categories=10)
    # All images alike, with the cosine of a query to its product, as the published recall is of such images.
    noise = 1 - ((1 - few.query_noise) * (1 - few.gallery_noise)) ** 0.5
    made = SyntheticProducts(gallery_noise=noise, query_noise=noise)
    measured["synthetic, 100 products"] = synthetic_images(few, 100, ("query",) * 12 + ("gallery",) * 4)
    measured[f"synthetic, {_SEARCH_PRODUCTS:,} products"] = synthetic_images(
        made, _SEARCH_PRODUCTS, ("query",) * _SEARCH_IMAGES
    )
    rows: list[Row] = []
    for name, images in measured.items():
        rows.append(statistics_row(name, measure_statistics(images)))
        log.info(f"  {rows[-1]}")
    record("gallery", [], {"embeddings": rows})
