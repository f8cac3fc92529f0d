"""``vpr catalog``: read, check and split the images of a data set."""

from pathlib import Path
from typing import Any

from vpr.artifacts.stage import Stage
from vpr.artifacts.writer import check_output, config_to_json, find_up_to_date, write_artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, Rejected, load_catalog, rows_to_table, write_catalog_files
from vpr.data.catalog_summary import summary_lines
from vpr.data.config import CatalogConfig
from vpr.data.division import Division, Shares, split_by_product
from vpr.data.image_files import FOLDER_LINK, skipped_files
from vpr.data.intake import check_images, read_data, warn_of_skipped
from vpr.data.location import write_location
from vpr.data.splits import warn_of_moves, warn_of_own_leaks

log = get_logger(__name__)


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
    if config.image_root:
        values["image_root"] = str(Path(config.image_root).resolve())
    options = config.read_options()
    data = read_data(config.reader, Path(config.root), options, config.skip_unreadable, config.skip_invalid_rows)
    if config.reader in ("folder", "images", "webdataset"):
        skipped = skipped_files(data.root, Path(config.output), [Path(folder) for folder in config.follow_links])
        skipped = [file for file in skipped if file[1] == FOLDER_LINK or config.reader != "webdataset"]
        warn_of_skipped(skipped)
        data.set_aside += skipped
    division = data.divide(_shares(config))
    _check_met(division)
    catalog = Catalog(division.table, data.root)
    rejected = data.set_aside + division.left_out
    old = find_up_to_date(config.output, "catalog", values, [])
    if old and old.card.metrics["set_aside"] == len(rejected) and load_catalog(old.path).table.equals(catalog.table):
        write_location(old.path, data.root)  # the same images may have moved
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    replaced = load_replaced(config.output)
    with write_artifact(config.output, "catalog", values) as draft:
        write_catalog_files(draft, catalog, rejected)
    _log_summary(config, catalog, rejected, data.notes)
    if replaced:
        warn_of_moves(replaced, catalog)
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
        division = split_by_product(rows_to_table(rows), _shares(config))
        _check_met(division)
        catalog = Catalog(division.table, draft.path)
        write_catalog_files(draft, catalog, division.left_out)
    _log_summary(config, catalog, division.left_out, division.notes)
    return stage.path


def shares_of(reader: str, validation: float, test: float, seed: int, resplit: bool) -> Shares:
    """Return the shares for the images of a reader.

    Every image of AIcrowd has a role, which says what the image shows and not who may use it: shares divide all of
    its products.
    """
    return Shares(validation, test, seed, resplit or (reader == "aicrowd" and validation + test > 0))


def _shares(config: CatalogConfig) -> Shares:
    return shares_of(config.reader, config.validation, config.test, config.seed, config.resplit)


def _check_met(division: Division) -> None:
    if division.unmet:
        raise UserError(division.unmet[0])


def load_replaced(output: str) -> Catalog | None:
    """Return the catalogue that is about to be replaced; None if there is none that can be read."""
    try:
        return load_catalog(output) if Path(output).exists() else None
    except UserError:
        return None


def _log_summary(config: CatalogConfig, catalog: Catalog, rejected: list[Rejected], notes: list[str]) -> None:
    products = len(set(catalog.products.tolist()))
    log.info(f"{config.output}: {len(catalog)} images of {products} products, {len(rejected)} set aside")
    for line in summary_lines(catalog, rejected, notes):
        log.info(f"  {line}")
    warn_of_own_leaks(catalog)
