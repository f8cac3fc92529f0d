"""``vpr teacher data``: data sets -> checked, split apart, joined -> one catalogue to train on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teacher.config import DataConfig
from vpr.artifacts.store import config_to_json, file_sha256, find_up_to_date, write_artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.build_catalog import check_images
from vpr.data.catalog import Catalog, Rejected, image_root, rows_to_table, write_catalog_files
from vpr.data.duplicates import Duplicates, common_root, merge
from vpr.data.readers import READERS
from vpr.data.splits import find_leaks, split_by_product

log = get_logger(__name__)

Repeat = tuple[str, str, str]
TABLES = {
    "products10k": ("train.csv", "test_kaggletest.csv"),
    "aicrowd": ("gallery.csv", "queries.csv"),
}


def build_data(config: DataConfig) -> Path:
    """Write the training catalogue: validation carved from each source, then joined, nothing scored left in training.

    ``duplicates.csv`` in the artifact lists repeated images by ``image``, ``of`` and ``kind``: ``same`` bytes,
    ``near`` the same (with ``across splits`` where one is trained on and the other scored), and the rows that
    :func:`drop_split_overlap` has ``dropped``. Nothing is done again while configuration and tables are unchanged; images
    replaced under the same names are not noticed.

    Raises:
        UserError: a broken source, or (without ``skip_unreadable``) an image that cannot be read.
    """
    root = common_root([image_root(reader, str(path)) for reader, path in config.sources()])
    values = config_to_json(config) | {"reader": "table", "root": str(root), "tables": _checksums(config)}
    if find_up_to_date(config.output, "catalog", values, []):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    catalogs, refused = [], []
    for reader, path in config.sources():
        catalog, aside = _read(config, reader, path)
        above = catalog.root.resolve().relative_to(root)
        refused += [((above / image).as_posix(), reason) for image, reason in aside]
        catalogs.append(catalog)
    log.info("looking for images that repeat ...")
    whole, duplicates = merge(catalogs)
    joined, dropped = drop_split_overlap(whole)
    find_leaks(joined, allow=False)
    _check_held_out(config, joined)
    repeats = list_repeats(whole, joined, duplicates, dropped)
    counts = {
        "same_bytes": len(duplicates.same_bytes),
        "near_same": len(duplicates.near_same),
        "near_same_across_splits": sum(kind == "near, across splits" for _, _, kind in repeats),
        "dropped": len(dropped),
    }
    with write_artifact(config.output, "catalog", values) as draft:
        write_catalog_files(draft, joined, refused)
        with (draft.path / "duplicates.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("image", "of", "kind"), *repeats])
        draft.metrics |= counts
    _say_built(config, joined, catalogs, refused, counts)
    return Path(config.output)


def drop_split_overlap(catalog: Catalog) -> tuple[Catalog, list[Repeat]]:
    """Take out what would be seen before it is scored.

    An image (same bytes) or product of ``test`` leaves ``validation`` and ``train``, one of ``validation`` leaves
    ``train``. Held-out products without a gallery lose their queries, which no result could be right for.

    Returns:
        what is left, and the rows taken out, as (image, the held-out image or product, kind).
    """
    dropped: list[Repeat] = []
    for held in ("test", "validation"):
        # First of all: what is no longer scored may be trained on.
        alone = _queries_without_gallery(catalog, held)
        rows = catalog.table.filter(pa.array(alone))
        pairs = zip(rows["image"].to_pylist(), rows["product"].to_pylist(), strict=True)
        dropped += [(image, product, "dropped, no gallery") for image, product in pairs]
        catalog = catalog.where(~alone)
        splits = catalog.table["split"].to_numpy()
        scored = catalog.table.filter(pa.array(splits == held))
        below = np.isin(splits, ["train"] if held == "validation" else ["train", "validation"])
        for column, kind in (("sha256", "dropped"), ("product", "dropped, product")):
            at = pc.index_in(catalog.table[column].combine_chunks(), scored[column].combine_chunks())
            leaves = below & at.is_valid().to_numpy(zero_copy_only=False)
            name = "image" if column == "sha256" else "product"
            of = scored[name].take(at.filter(pa.array(leaves))).to_pylist()
            images = catalog.table["image"].filter(pa.array(leaves)).to_pylist()
            dropped += [(image, other, kind) for image, other in zip(images, of, strict=True)]
            catalog, below = catalog.where(~leaves), below[~leaves]
    return catalog, dropped


def list_repeats(whole: Catalog, left: Catalog, duplicates: Duplicates, dropped: list[Repeat]) -> list[Repeat]:
    """The lines of ``duplicates.csv``: what was taken out first, then repeats.

    Args:
        whole: all rows.
        left: those that were not taken out, in which no two splits share an image.
        duplicates: of all rows.
        dropped: what was taken out.
    """
    # By bytes: of two copies the one that a pair names may have been taken out.
    sha256 = dict(zip(whole.table["image"].to_pylist(), whole.table["sha256"].to_pylist(), strict=True))
    split = dict(zip(left.table["sha256"].to_pylist(), left.table["split"].to_pylist(), strict=True))
    near = []
    for pair in duplicates.near_same:
        splits = {split[sha256[image]] for image in pair if sha256[image] in split}
        near.append((*pair, "near, across splits" if len(splits) == 2 else "near"))
    return [*dropped, *((later, earlier, "same") for later, earlier in duplicates.same_bytes), *near]


def _read(config: DataConfig, reader: str, path: Path) -> tuple[Catalog, list[Rejected]]:
    """A source, checked and split."""
    rows = list(READERS[reader](path))
    if not rows:
        raise UserError(f"{path}: no images here: check --{reader}")
    log.info(f"{path}: decoding {len(rows)} images ...")
    root = image_root(reader, str(path))
    good, refused = check_images(root, rows, config.skip_unreadable)
    if not good:
        raise UserError(f"{path}: none of its {len(rows)} images can be read: check --{reader}")
    table = rows_to_table(good)
    if table["split"].unique().to_pylist() == ["train"]:
        try:
            table = split_by_product(table, config.validation, config.test, config.seed)
        except UserError as error:
            log.info(f"  {path}: all of it stays in training: {error}")
    return Catalog(table, root), refused


def _check_held_out(config: DataConfig, joined: Catalog) -> None:
    """Refuse a catalogue without the held-out images that were asked for."""
    for name, share in (("validation", config.validation), ("test", config.test)):
        if share and not len(joined.select(split=name)):
            raise UserError(f"{name} {share}: no source has the products for it: raise it or add images")


def _checksums(config: DataConfig) -> dict[str, str]:
    """Checksums of the tables that the sources consist of; a reader says what is wrong with a missing one."""
    tables = []
    for reader, path in config.sources():
        tables += [path / name for name in TABLES[reader]] if reader in TABLES else [path]
    return {str(table.resolve()): file_sha256(table) for table in tables if table.is_file()}


def _queries_without_gallery(catalog: Catalog, held: str) -> NDArray[np.bool_]:
    """(n,) whether a row is a query of a split whose gallery lacks its product."""
    table = catalog.table
    in_split = pc.equal(table["split"], held)
    gallery = table["product"].filter(pc.and_(in_split, pc.equal(table["role"], "gallery")))
    answered = pc.is_in(table["product"], gallery.combine_chunks())
    return pc.and_(pc.and_(in_split, pc.equal(table["role"], "query")), pc.invert(answered)).to_numpy()


def _say_built(
    config: DataConfig, joined: Catalog, catalogs: list[Catalog], refused: list[Rejected], counts: dict[str, Any]
) -> None:
    summary = joined.summary()
    several = sum(len(catalog.table["product"].unique()) for catalog in catalogs)
    several -= len(pa.chunked_array([c for catalog in catalogs for c in catalog.table["product"].chunks]).unique())
    if several:
        log.info(f"  {several} products have the same id in more than one source and are taken for one")
    log.info(
        f"  repeated images: {counts['same_bytes']} same bytes, {counts['near_same']} near-same "
        f"({counts['near_same_across_splits']} across splits), {counts['dropped']} rows left out because their image "
        "or product is scored (listed in duplicates.csv)"
    )
    where = " (listed in set_aside.csv)" if refused else ""
    parts = ", ".join(f"{n} {split}" for split, n in summary["images"].items() if n)
    log.info(
        f"{config.output}: {len(joined)} images of {len(joined.table['product'].unique())} products ({parts}), "
        f"{len(refused)} set aside{where}"
    )
