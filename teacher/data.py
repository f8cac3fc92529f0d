"""``vpr teacher data``: check, split and join data sets into one training catalogue."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teacher.config import DataConfig
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import file_sha256
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.build_catalog import check_images
from vpr.data.catalog import Catalog, Rejected, image_root, rows_to_table, write_catalog_files
from vpr.data.duplicates import Duplicates, common_root, merge
from vpr.data.readers import READERS
from vpr.data.relocate import find_relocated
from vpr.data.splits import find_leaks, split_by_product

log = get_logger(__name__)

Repeat = tuple[str, str, str]
TABLES = {"products10k": ("train.csv", "test_kaggletest.csv"), "aicrowd": ("gallery.csv", "queries.csv")}


def build_data(config: DataConfig) -> Path:
    """Write the training catalogue: split each source, join them, and drop what is held out from training.

    ``duplicates.csv`` in the artifact lists repeated images by ``image``, ``of`` and ``kind``. Kinds are ``same``
    (equal bytes), ``near`` (near-duplicates, or ``near, across splits`` if one is trained on and the other held out)
    and ``dropped`` (rows removed by :func:`drop_split_overlap`). The output is up to date while configuration and
    tables are unchanged; images replaced under the same names are not detected.

    Raises:
        UserError: A source is broken, or an image cannot be read and ``skip_unreadable`` is off.
    """
    root = common_root([image_root(reader, str(path)) for reader, path in config.sources()])
    values = config_to_json(config) | {"reader": "table", "root": str(root), "tables": _table_checksums(config)}
    stage = Stage(config.output, "catalog", values, [])
    if find_relocated(stage, root):
        return stage.path
    catalogs: list[Catalog] = []
    set_aside: list[Rejected] = []
    for reader, path in config.sources():
        catalog, rejected = _read_source(config, reader, path)
        folder = catalog.root.resolve().relative_to(root)
        set_aside += [((folder / image).as_posix(), reason) for image, reason in rejected]
        catalogs.append(catalog)

    log.info("searching for repeated images ...")
    merged, duplicates = merge(catalogs)
    joined, dropped = drop_split_overlap(merged)
    find_leaks(joined, allow=False)
    _check_held_out(config, joined)
    repeats = list_repeats(merged, joined, duplicates, dropped)
    counts = {"same_bytes": len(duplicates.same_bytes), "near_same": len(duplicates.near_same)}
    counts["near_same_across_splits"] = sum(kind == "near, across splits" for _, _, kind in repeats)
    counts["dropped"] = len(dropped)
    with stage.write() as writer:
        write_catalog_files(writer, joined, set_aside)
        with (writer.path / "duplicates.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("image", "of", "kind"), *repeats])
        writer.metrics |= counts
    _log_summary(config, joined, catalogs, set_aside, counts)
    return stage.path


def drop_split_overlap(catalog: Catalog) -> tuple[Catalog, list[Repeat]]:
    """Drop rows whose image or product is held out in a later split; list them as (image, held-out name, kind).

    An image (same bytes) or product of ``test`` is dropped from ``validation`` and ``train``, one of ``validation``
    from ``train``. Held-out queries without a gallery image of their product are dropped too, since no result could
    be correct.
    """
    dropped: list[Repeat] = []
    for held_out in ("test", "validation"):
        # First, because images of dropped queries are no longer held out and may be trained on.
        unanswerable = _queries_without_gallery(catalog, held_out)
        rows = catalog.table.filter(pa.array(unanswerable))
        pairs = zip(rows["image"].to_pylist(), rows["product"].to_pylist(), strict=True)
        dropped += [(image, product, "dropped, no gallery") for image, product in pairs]
        catalog = catalog.where(~unanswerable)
        splits = catalog.table["split"].to_numpy()
        scored = catalog.table.filter(pa.array(splits == held_out))
        is_earlier = np.isin(splits, ["train"] if held_out == "validation" else ["train", "validation"])
        for column, kind in (("sha256", "dropped"), ("product", "dropped, product")):
            match = pc.index_in(catalog.table[column].combine_chunks(), scored[column].combine_chunks())
            is_overlap = is_earlier & match.is_valid().to_numpy(zero_copy_only=False)
            name = "image" if column == "sha256" else "product"
            originals = scored[name].take(match.filter(pa.array(is_overlap))).to_pylist()
            images = catalog.table["image"].filter(pa.array(is_overlap)).to_pylist()
            dropped += [(image, original, kind) for image, original in zip(images, originals, strict=True)]
            catalog, is_earlier = catalog.where(~is_overlap), is_earlier[~is_overlap]
    return catalog, dropped


def list_repeats(merged: Catalog, joined: Catalog, duplicates: Duplicates, dropped: list[Repeat]) -> list[Repeat]:
    """Return the rows of ``duplicates.csv``: dropped rows first, then the repeated images of all sources.

    In ``joined``, the remaining rows of ``merged``, no two splits share an image.
    """
    # Look splits up by bytes, because the copy that a pair names may have been dropped.
    sha256 = dict(zip(merged.table["image"].to_pylist(), merged.table["sha256"].to_pylist(), strict=True))
    split = dict(zip(joined.table["sha256"].to_pylist(), joined.table["split"].to_pylist(), strict=True))
    near = []
    for pair in duplicates.near_same:
        splits = {split[sha256[image]] for image in pair if sha256[image] in split}
        near.append((*pair, "near, across splits" if len(splits) == 2 else "near"))
    return [*dropped, *((later, earlier, "same") for later, earlier in duplicates.same_bytes), *near]


def _read_source(config: DataConfig, reader: str, path: Path) -> tuple[Catalog, list[Rejected]]:
    """Return a source's checked and split catalogue, and its rejected images with the reason."""
    rows = list(READERS[reader](path))
    if not rows:
        raise UserError(f"{path}: the source has no images. Check --{reader}.")
    log.info(f"{path}: decoding {len(rows)} images ...")
    root = image_root(reader, str(path))
    accepted, rejected = check_images(root, rows, config.skip_unreadable)
    if not accepted:
        raise UserError(f"{path}: none of its {len(rows)} images can be read. Check --{reader}.")
    table = rows_to_table(accepted)
    if table["split"].unique().to_pylist() == ["train"]:
        try:
            table = split_by_product(table, config.validation, config.test, config.seed)
        except UserError as error:
            log.warning(f"{path}: nothing is held out of this source. {error}")
    return Catalog(table, root), rejected


def _check_held_out(config: DataConfig, joined: Catalog) -> None:
    """Raise :class:`UserError` if a requested split is empty."""
    for name, share in (("validation", config.validation), ("test", config.test)):
        if share and not len(joined.select(split=name)):
            raise UserError(f"{name}: no source has enough products for {share}. Raise it or add images.")


def _table_checksums(config: DataConfig) -> dict[str, str]:
    """Return the checksums of the sources' tables; the readers report missing tables."""
    tables = []
    for reader, path in config.sources():
        tables += [path / name for name in TABLES[reader]] if reader in TABLES else [path]
    return {str(table.resolve()): file_sha256(table) for table in tables if table.is_file()}


def _queries_without_gallery(catalog: Catalog, split: str) -> NDArray[np.bool_]:
    """Return (n,) bool: whether a row is a query of the split whose gallery lacks its product."""
    table = catalog.table
    in_split = pc.equal(table["split"], split)
    gallery = table["product"].filter(pc.and_(in_split, pc.equal(table["role"], "gallery")))
    has_gallery = pc.is_in(table["product"], gallery.combine_chunks())
    return pc.and_(pc.and_(in_split, pc.equal(table["role"], "query")), pc.invert(has_gallery)).to_numpy()


def _log_summary(
    config: DataConfig, joined: Catalog, catalogs: list[Catalog], set_aside: list[Rejected], counts: dict[str, Any]
) -> None:
    chunks = [chunk for catalog in catalogs for chunk in catalog.table["product"].chunks]
    shared = sum(len(catalog.table["product"].unique()) for catalog in catalogs)
    shared -= len(pa.chunked_array(chunks).unique())
    if shared:
        log.warning(f"{shared} product ids occur in more than one source; each is treated as one product")
    log.info(
        f"  repeated images: {counts['same_bytes']} same bytes, {counts['near_same']} near-same "
        f"({counts['near_same_across_splits']} across splits), {counts['dropped']} rows dropped from training because "
        "their image or product is held out (listed in duplicates.csv)"
    )
    listed = " (listed in set_aside.csv)" if set_aside else ""
    splits = ", ".join(f"{count} {split}" for split, count in joined.summary()["images"].items() if count)
    products = f"{len(joined.table['product'].unique())} products ({splits})"
    log.info(f"{config.output}: {len(joined)} images of {products}, {len(set_aside)} set aside{listed}")
