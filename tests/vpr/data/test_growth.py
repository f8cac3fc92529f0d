"""Catalogues that grow, built by every reader: no scored image or product was trained on by an earlier version."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from teacher.config import DataConfig
from teacher.data import build_data
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.splits import find_leaks

Image_ = tuple[str, str, str, str, bytes]  # product, name, split, role, bytes
OWN = ("", "", "", "", "train", "validation", "test")


def _grow(images: list[Image_], rng: random.Random, step: int, has_splits: bool, has_roles: bool) -> list[Image_]:
    """Add images to old and new products. A tenth of them repeats an image of another product."""
    splits = {product: split for product, _, split, _, _ in images}
    products = [*splits, *(f"p{step}-{number}" for number in range(8))]
    for number in range(24):
        product = rng.choice(products)
        split = splits.setdefault(product, rng.choice(OWN) if has_splits else "")
        role = rng.choice(("", "", "gallery", "query")) if has_roles else ""
        pixels = np.random.default_rng(rng.randrange(1 << 40)).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png")
        data = rng.choice(images)[4] if images and rng.random() < 0.1 else stream.getvalue()
        images = [*images, (product, f"{step}-{number}.png", split, role, data)]
    return rng.sample(images, len(images))


def _write_csv(root: Path, images: list[Image_]) -> Path:
    with (root / "shop.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "product", "split", "role"])
        for product, name, split, role, data in images:
            (root / f"{product}-{name}").write_bytes(data)
            writer.writerow([f"{product}-{name}", product, split, role])
    return root / "shop.csv"


def _write_folder(root: Path, images: list[Image_]) -> Path:
    """Folders of products; of splits if every image has one."""
    is_split = all(split for _, _, split, _, _ in images)
    for product, name, split, _, data in images:
        path = root / (split if is_split else "") / product / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def _write_shards(root: Path, images: list[Image_]) -> Path:
    for number in range(2):
        with tarfile.open(root / f"{number}.tar", "w") as tar:
            for product, name, split, role, data in images[number::2]:
                label = {"product": product} | ({"split": split} if split else {}) | ({"role": role} if role else {})
                for suffix, content in ((".png", data), (".json", json.dumps(label).encode())):
                    info = tarfile.TarInfo(f"{product}-{Path(name).stem}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


_UNMET = ("selects n", "enough products", "no product to train on")
WRITERS = {"csv": _write_csv, "folder": _write_folder, "webdataset": _write_shards, "teacher data": _write_csv}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("has_splits", [False, True])
@pytest.mark.parametrize("reader", WRITERS)
def test_no_version_scores_what_an_earlier_one_trained_on(
    reader: str, has_splits: bool, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(f"{reader}{has_splits}{seed}")
    shares = {"validation": rng.choice((0.2, 0.4)), "test": rng.choice((0.0, 0.2)), "seed": seed}
    images: list[Image_] = []
    trained: dict[str, set[str]] = {"product": set(), "sha256": set()}
    built = 0
    for step in range(4):
        images = _grow(images, rng, step, has_splits, has_roles=has_splits and reader != "folder")
        if reader == "folder" and has_splits:
            images = [(p, n, split or "train", r, d) for p, n, split, r, d in images]
        root = tmp_path / str(step)
        root.mkdir()
        catalog = _build(reader, WRITERS[reader](root, images), tmp_path / f"catalog-{step}", shares)
        if catalog is None:
            continue
        built += 1
        assert find_leaks(catalog, allow=True) == {}
        own = {product for product, _, split, _, _ in images if split in ("validation", "test")}
        for row in catalog.table.to_pylist():
            for column, seen in trained.items():
                if row["split"] == "train":
                    seen.add(row[column])
                else:
                    # A table that tests copies of its older training images does so itself.
                    is_own = column == "sha256" and row["product"] in own
                    assert is_own or row[column] not in seen, row
        shutil.rmtree(root)
    assert built >= 2


def _build(reader: str, root: Path, output: Path, shares: dict[str, Any]) -> Catalog | None:
    """Return the catalogue; None if a share selects nothing, which writes nothing."""
    try:
        if reader == "teacher data":
            return load_catalog(build_data(DataConfig(str(output), csv=(str(root),), **shares)))
        return load_catalog(build_catalog(CatalogConfig(reader, str(output), str(root), **shares)))
    except UserError as error:
        if output.exists() or not any(text in str(error) for text in _UNMET):
            raise
        return None
