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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from calibration.sampling import select_images
from teacher.config import DataConfig
from teacher.data import build_data
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.seen import Seen, combine, count_seen, hash_catalog, seen_in
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


def _write_json_lines(root: Path, images: list[Image_]) -> Path:
    """Empty keys are left out, so the first object may lack the keys of later ones."""
    lines = []
    for product, name, split, role, data in images:
        (root / f"{product}-{name}").write_bytes(data)
        record = {"image": f"{product}-{name}", "product": f" {product}\u00a0", "split": split, "role": role}
        lines.append(json.dumps({key: value for key, value in record.items() if value}))
    (root / "shop.jsonl").write_text("\n".join(lines) + "\n")
    return root / "shop.jsonl"


def _write_parquet(root: Path, images: list[Image_]) -> Path:
    """Whole images and boxes alternate; one photo in two boxes shows two products."""
    columns: dict[str, list[Any]] = {name: [] for name in ("image", "product", "split", "role", "box")}
    for number, (product, name, split, role, data) in enumerate(images):
        (root / f"{product}-{name}").write_bytes(data)
        box = None if number % 2 else [0.0, 0.0, 3.0 + number % 3, 6.0]
        for key, value in zip(columns, (f"{product}-{name}", product, split or None, role or None, box), strict=True):
            columns[key].append(value)
    pq.write_table(pa.table(columns), root / "shop.parquet")
    return root / "shop.parquet"


def _write_aicrowd(root: Path, images: list[Image_]) -> Path:
    """All images have a role; shares divide the products."""
    rows: dict[str, list[str]] = {
        "gallery": ["img_path,product_id"],
        "queries": ["img_path,product_id,bbox_x,bbox_y,bbox_w,bbox_h"],
    }
    for number, (product, name, _, _, data) in enumerate(images):
        table = ("gallery", "queries")[int(name.split("-")[1].removesuffix(".png")) % 2]
        (root / f"{product}-{name}").write_bytes(data)
        rows[table].append(f"{product}-{name},{product}" + (f",0,0,{2 + number % 4},6" if table == "queries" else ""))
    for name, lines in rows.items():
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return root


def _write_products10k(root: Path, images: list[Image_]) -> Path:
    tables = {"train": ["name,class,group"], "test_kaggletest": ["name,class,Usage"]}
    for number, (product, name, _, _, data) in enumerate(images):
        folder = "test" if number % 3 == 0 else "train"
        (root / folder).mkdir(exist_ok=True)
        (root / folder / f"{product}-{name}").write_bytes(data)
        tables["test_kaggletest" if folder == "test" else "train"].append(f"{product}-{name},{product},1")
    for name, lines in tables.items():
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return root


_UNMET = (
    "selects n",
    "enough products",
    "no product to train on",
    "is left. Images were set aside",
    "all its ",
    "queries equal",
)
# Writer of each source, the reader that reads it, and whether it has splits.
WRITERS = {
    "csv": (_write_csv, "csv"),
    "json lines": (_write_json_lines, "csv"),
    "parquet": (_write_parquet, "csv"),
    "folder": (_write_folder, "folder"),
    "webdataset": (_write_shards, "webdataset"),
    "aicrowd": (_write_aicrowd, "aicrowd"),
    "products10k": (_write_products10k, "products10k"),
    "teacher data": (_write_csv, "teacher data"),
    "teacher data, parquet": (_write_parquet, "teacher data"),
}
_WITHOUT_SPLITS = ("aicrowd", "products10k")
CASES = [(source, split) for source in WRITERS for split in (False, True) if not (split and source in _WITHOUT_SPLITS)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("source", "has_splits"), CASES)
def test_no_version_scores_what_an_earlier_one_has_seen(
    source: str, has_splits: bool, seed: int, tmp_path: Path
) -> None:
    """Training, distillation and calibration may have seen no scored row, selection none of the test split."""
    rng = random.Random(f"{source}{has_splits}{seed}")
    write, reader = WRITERS[source]
    shares = {"validation": rng.choice((0.2, 0.4)), "test": rng.choice((0.2, 0.3)), "seed": seed}
    images: list[Image_] = []
    learned: dict[str, set[str]] = {"product": set(), "sha256": set()}
    selected: dict[str, set[str]] = {"product": set(), "sha256": set()}
    records: list[Seen] = []
    built = 0
    for step in range(4):
        images = _grow(images, rng, step, has_splits, has_roles=has_splits and reader != "folder")
        if reader == "folder" and has_splits:
            images = [(p, n, split or "train", r, d) for p, n, split, r, d in images]
        root = tmp_path / str(step)
        root.mkdir()
        catalog = _build(reader, write(root, images), tmp_path / f"catalog-{step}", shares)
        shutil.rmtree(root)
        if catalog is None:
            continue
        built += 1
        assert find_leaks(catalog, allow=True) == {}
        own = {product for product, _, split, _, _ in images if split in ("validation", "test")}
        for row in catalog.table.to_pylist():
            for column in ("product", "sha256"):
                if row["split"] == "train":
                    learned[column].add(row[column])
                # A table that tests copies of its older images does so itself.
                elif not (column == "sha256" and row["product"] in own):
                    assert row[column] not in learned[column], row
                if row["split"] == "validation":
                    selected[column].add(row[column])
                elif row["split"] == "test" and not has_splits:
                    assert row[column] not in selected[column], row
        _check_scored(catalog)
        records += _uses(catalog, seed)
        if not has_splits:
            for split in ("validation", "test"):
                counts = count_seen(combine(records), hash_catalog(catalog.select(split=split)))
                assert (counts.learned, counts.unrecorded) == ("", "")
                assert split == "validation" or counts.selected == ""
    assert built >= 2


def _uses(catalog: Catalog, seed: int) -> list[Seen]:
    """Return what a teacher, a student and a quantised graph of the catalogue would record."""
    training = catalog.select(split="train")
    sample = training.take(
        select_images(
            training,
            max(1, len(training) // 3),
            seed,
            evaluation=catalog.where(catalog.table["split"].to_numpy() != "train"),
        )
    )
    parts = {"training": training, "distillation": training, "calibration": sample}
    records = [seen_in(part, use) for use, part in parts.items()]  # type: ignore[arg-type]
    return [*records, seen_in(catalog.select(split="validation"), "selection")]


def _check_scored(catalog: Catalog) -> None:
    """No scored image is in its gallery, under two products, or a query that no result can answer rightly."""
    for split in ("validation", "test"):
        rows = catalog.select(split=split).table.to_pylist()
        content = [(row["sha256"], str(row["box"])) for row in rows]
        products: dict[tuple[str, str], set[str]] = {}
        for key, row in zip(content, rows, strict=True):
            products.setdefault(key, set()).add(row["product"])
        assert all(len(names) == 1 for names in products.values())
        gallery = {key for key, row in zip(content, rows, strict=True) if row["role"] == "gallery"}
        assert not [row for key, row in zip(content, rows, strict=True) if row["role"] == "query" and key in gallery]
        assert {row["role"] for row in rows} <= {"query", "gallery"}


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
