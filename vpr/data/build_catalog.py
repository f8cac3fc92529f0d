"""``vpr catalog``: images of a reader -> decoded once, split by product -> a catalogue."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vpr.artifacts.store import check_output, config_to_json, find_up_to_date, write_artifact
from vpr.common.errors import UserError
from vpr.common.hardware import available_cpus
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, Rejected, image_root, load_catalog, rows_to_table, write_catalog_files
from vpr.data.config import CatalogConfig
from vpr.data.readers import LINKED, READERS, Row, skipped_files
from vpr.data.splits import split_by_product
from vpr.imaging.decode import ImageRejected, decode_bytes, read_image

log = get_logger(__name__)

_CHECK_SIZE = 64  # pixels; JPEGs are read to their end at a reduced scale


def build_catalog(config: CatalogConfig) -> Path:
    """Read, check and split images, and write them as an artifact of kind ``catalog``.

    Every image is decoded once. The sample's images lie in the artifact, others stay where they are.

    Raises:
        UserError: no images, a broken table, or (without ``skip_unreadable``) an image that cannot be read.
    """
    values = config_to_json(config)
    if config.reader == "sample":
        return _build_sample(config, values)
    if not config.root:
        raise UserError(f"root: empty: give the folder or CSV file that the {config.reader} reader reads")
    check_output(config.output, "catalog")
    values["root"] = str(Path(config.root).resolve())
    rows = list(READERS[config.reader](Path(config.root)))
    if not rows:
        raise UserError(f"{config.root}: no images here: check --root and --reader")
    root = image_root(config.reader, config.root)
    good, refused = check_images(root, rows, config.skip_unreadable)
    if config.reader in ("folder", "images", "webdataset"):
        over = skipped_files(root, Path(config.output))
        refused += [one for one in over if one[1] == LINKED or config.reader != "webdataset"]
    if not good:
        raise UserError(f"{config.root}: none of its {len(rows)} images can be read: check --root")
    catalog = Catalog(split_by_product(rows_to_table(good), config.validation, config.test, config.seed), root)
    old = find_up_to_date(config.output, "catalog", values, [])
    if old and old.card.metrics["set_aside"] == len(refused) and load_catalog(old.path).table.equals(catalog.table):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    with write_artifact(config.output, "catalog", values) as draft:
        write_catalog_files(draft, catalog, refused)
    _say_built(config, catalog, refused)
    return Path(config.output)


def _build_sample(config: CatalogConfig, values: dict[str, Any]) -> Path:
    """The embedded sample, its images unpacked into the artifact."""
    from vpr.data.sample import unpack

    if find_up_to_date(config.output, "catalog", values, []):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    with write_artifact(config.output, "catalog", values) as draft:
        draft.unlisted = frozenset({"images"})
        rows, _ = check_images(draft.path, list(unpack(draft.path)), skip_unreadable=False)
        catalog = Catalog(
            split_by_product(rows_to_table(rows), config.validation, config.test, config.seed), draft.path
        )
        write_catalog_files(draft, catalog, [])
    _say_built(config, catalog, [])
    return Path(config.output)


def check_images(root: Path, rows: list[Row], skip_unreadable: bool) -> tuple[list[Row], list[Rejected]]:
    """Decode every image once and add its ``sha256``.

    Args:
        root: folder that ``image`` is relative to.
        rows: of a reader; one with ``refused`` is set aside for that reason.
        skip_unreadable: collect refusals instead of raising the first.

    Returns:
        the readable rows, and (image, reason) of the others.
    """
    good: list[Row] = []
    refused: list[Rejected] = []
    with ThreadPoolExecutor(len(available_cpus())) as pool:
        for row, outcome in zip(rows, pool.map(lambda row: _check(root, row), rows), strict=True):
            if isinstance(outcome, str):
                good.append({**row, "sha256": outcome})
            elif skip_unreadable or "refused" in row:
                refused.append((row["image"], outcome.reason))
            else:
                pool.shutdown(cancel_futures=True)
                raise outcome
    return good, refused


def _say_built(config: CatalogConfig, catalog: Catalog, refused: list[Rejected]) -> None:
    where = " (listed in set_aside.csv)" if refused else ""
    products = len(set(catalog.products.tolist()))
    log.info(f"{config.output}: {len(catalog)} images of {products} products, {len(refused)} set aside{where}")


def _check(root: Path, row: Row) -> str | ImageRejected:
    path, box = root / row["image"], row.get("box")
    if "refused" in row:
        return ImageRejected(path, row["refused"])
    try:
        data = read_image(path)
        decode_bytes(data, path, None if box is None else tuple(box.values()), _CHECK_SIZE)
    except ImageRejected as refused:
        return refused
    return hashlib.sha256(data).hexdigest()
