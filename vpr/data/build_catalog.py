"""``vpr catalog``: read, check and split the images of a data set."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vpr.artifacts.stage import Stage
from vpr.artifacts.writer import check_output, config_to_json, find_up_to_date, write_artifact
from vpr.common.errors import UserError
from vpr.common.hardware import available_cpus
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, Rejected, image_root, load_catalog, rows_to_table, write_catalog_files
from vpr.data.config import CatalogConfig
from vpr.data.location import write_location
from vpr.data.readers import FOLDER_LINK, READERS, Row, skipped_files
from vpr.data.splits import split_by_product
from vpr.imaging.decode import ImageRejected, decode_bytes, read_image

log = get_logger(__name__)

_CHECK_SIZE = 64  # pixels; JPEGs are decoded to their end, at a reduced scale


def build_catalog(config: CatalogConfig) -> Path:
    """Read, check and split images, and write an artifact of kind ``catalog``.

    Every image is decoded once. The sample's images are stored in the artifact, other images stay in their folder.

    Raises:
        UserError: There are no images, a table is broken, or an image is unreadable without ``skip_unreadable``.
    """
    values = config_to_json(config)
    if config.reader == "sample":
        return _build_sample(config, values)
    if not config.root:
        raise UserError(f"root: it is missing. Give the folder or CSV file for the {config.reader} reader with --root.")
    check_output(config.output, "catalog")
    values["root"] = str(Path(config.root).resolve())
    rows = list(READERS[config.reader](Path(config.root)))
    if not rows:
        raise UserError(f"{config.root}: there are no images here. Check --root and --reader.")
    root = image_root(config.reader, config.root)
    readable, rejected = check_images(root, rows, config.skip_unreadable)
    if config.reader in ("folder", "images", "webdataset"):
        skipped = skipped_files(root, Path(config.output))
        rejected += [file for file in skipped if file[1] == FOLDER_LINK or config.reader != "webdataset"]
    if not readable:
        raise UserError(f"{config.root}: none of its {len(rows)} images can be read. Check --root.")
    catalog = Catalog(split_by_product(rows_to_table(readable), config.validation, config.test, config.seed), root)
    old = find_up_to_date(config.output, "catalog", values, [])
    if old and old.card.metrics["set_aside"] == len(rejected) and load_catalog(old.path).table.equals(catalog.table):
        write_location(old.path, root)  # the same images may have moved
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    with write_artifact(config.output, "catalog", values) as draft:
        write_catalog_files(draft, catalog, rejected)
    _log_summary(config, catalog, rejected)
    return Path(config.output)


def _build_sample(config: CatalogConfig, values: dict[str, Any]) -> Path:
    """Build the catalogue of the embedded sample, with its images in the artifact."""
    from vpr.data.sample import unpack

    stage = Stage(config.output, "catalog", values, [])
    if stage.find():
        return stage.path
    with stage.write() as draft:
        draft.unlisted = frozenset({"images"})
        rows, _ = check_images(draft.path, list(unpack(draft.path)), skip_unreadable=False)
        table = split_by_product(rows_to_table(rows), config.validation, config.test, config.seed)
        catalog = Catalog(table, draft.path)
        write_catalog_files(draft, catalog, [])
    _log_summary(config, catalog, [])
    return stage.path


def check_images(root: Path, rows: list[Row], skip_unreadable: bool) -> tuple[list[Row], list[Rejected]]:
    """Decode every image once; return the readable rows with ``sha256``, and (image, reason) of the others.

    Rows with ``rejected`` have the reason there and are not decoded.
    An unreadable image raises :class:`ImageRejected` unless ``skip_unreadable``.
    """
    readable: list[Row] = []
    rejected: list[Rejected] = []
    with ThreadPoolExecutor(len(available_cpus())) as pool:
        for row, result in zip(rows, pool.map(lambda row: _check_image(root, row), rows), strict=True):
            if isinstance(result, str):
                readable.append({**row, "sha256": result})
            elif skip_unreadable or "rejected" in row:
                rejected.append((row["image"], result.reason))
            else:
                pool.shutdown(cancel_futures=True)
                raise result
    return readable, rejected


def _log_summary(config: CatalogConfig, catalog: Catalog, rejected: list[Rejected]) -> None:
    hint = " (listed in set_aside.csv)" if rejected else ""
    products = len(set(catalog.products.tolist()))
    log.info(f"{config.output}: {len(catalog)} images of {products} products, {len(rejected)} set aside{hint}")


def _check_image(root: Path, row: Row) -> str | ImageRejected:
    path, box = root / row["image"], row.get("box")
    if "rejected" in row:
        return ImageRejected(path, row["rejected"])
    try:
        data = read_image(path)
        decode_bytes(data, path, None if box is None else tuple(box.values()), _CHECK_SIZE)
    except ImageRejected as error:
        return error
    return hashlib.sha256(data).hexdigest()
