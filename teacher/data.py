"""``vpr teacher data``: check, split and join data sets into one training catalogue."""

import csv
from collections.abc import Iterable
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
from vpr.data.build_catalog import load_replaced, shares_of
from vpr.data.catalog import Catalog, Rejected, image_root, write_catalog_files
from vpr.data.catalog_summary import summary_lines
from vpr.data.config import ReadOptions
from vpr.data.division import TRAIN, Division, encode, find_overlap, image_keys, split_codes
from vpr.data.duplicates import Duplicates, common_root, merge
from vpr.data.identities import TWIN, find_conflicts, find_twins
from vpr.data.intake import read_data
from vpr.data.readers import UNLABELLED
from vpr.data.relocate import find_relocated
from vpr.data.splits import find_leaks, warn_of_moves

log = get_logger(__name__)

Repeat = tuple[str, str, str]
OwnSplits = dict[str, dict[str, int]]
TABLES = {"products10k": ("train.csv", "test_kaggletest.csv"), "aicrowd": ("gallery.csv", "queries.csv")}


def build_data(config: DataConfig) -> Path:
    """Write the training catalogue: split each source, join them, and drop what two splits would share.

    ``duplicates.csv`` in the artifact lists repeated images by ``image``, ``of`` and ``kind``. Kinds are ``same``
    (equal bytes), ``near`` (near-duplicates, or ``near, across splits`` if one is trained on and the other held out)
    and ``dropped`` (rows removed by :func:`drop_split_overlap` and :func:`drop_untrue_rows`). The output is up to date
    while configuration and tables are unchanged; images replaced under the same names are not detected.

    Raises:
        UserError: A source is broken, an image cannot be read and ``skip_unreadable`` is off, or no query is left of a
            split that a source has itself.
    """
    root = common_root([_image_root(config, reader, path) for reader, path in config.sources()])
    values = config_to_json(config) | {"reader": "table", "root": str(root), "tables": _table_checksums(config)}
    stage = Stage(config.output, "catalog", values, [])
    if find_relocated(stage, root):
        return stage.path
    catalogs: list[Catalog] = []
    divisions: list[Division] = []
    set_aside: list[Rejected] = []
    for reader, path in config.sources():
        division, rejected = _read_source(config, reader, path)
        catalogs.append(Catalog(division.table, _image_root(config, reader, path)))
        divisions.append(division)
        folder = catalogs[-1].root.resolve().relative_to(root)
        set_aside += [((folder / image).as_posix(), reason) for image, reason in [*rejected, *division.left_out]]

    log.info("searching for repeated images ...")
    merged, duplicates = merge(catalogs)
    joined, dropped = drop_split_overlap(merged, own_splits(divisions))
    joined, untrue = drop_untrue_rows(joined)
    dropped += untrue
    find_leaks(joined, allow=False)
    _check_held_out(config, joined)
    _check_own_queries(config, divisions, merged, joined, dropped)
    repeats = list_repeats(merged, joined, duplicates, dropped)
    counts = {"same_bytes": len(duplicates.same_bytes), "near_same": len(duplicates.near_same)}
    counts["near_same_across_splits"] = sum(kind == "near, across splits" for _, _, kind in repeats)
    counts["dropped"] = len(dropped)
    replaced = load_replaced(config.output)
    with stage.write() as writer:
        write_catalog_files(writer, joined, set_aside)
        with (writer.path / "duplicates.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("image", "of", "kind"), *repeats])
        writer.metrics |= counts
    _log_summary(config, joined, catalogs, set_aside, counts)
    if replaced:
        warn_of_moves(replaced, joined)
    return stage.path


def own_splits(divisions: Iterable[Division]) -> OwnSplits:
    """Return the code of the split in which the sources themselves hold out an image or product.

    The keys are ``sha256`` and ``product``, the columns of the table, then the values in the column.
    """
    own: OwnSplits = {"sha256": {}, "product": {}}
    for division in divisions:
        held_out = division.table.filter(pa.array(division.own))
        codes = split_codes(held_out).tolist()
        for keys, column in zip(own.values(), (image_keys(held_out), held_out["product"].to_pylist()), strict=True):
            for key, code in zip(column, codes, strict=True):
                keys[key] = max(code, keys.get(key, 0))
    return own


def drop_split_overlap(catalog: Catalog, own: OwnSplits) -> tuple[Catalog, list[Repeat]]:
    """Drop rows so that no two splits share an image (same bytes) or product; list them as (image, other name, kind).

    An image or product that a source itself holds out stays in that split and is dropped from the others. One that
    the shares would put into several splits is dropped from all of them. Held-out queries without a gallery image of
    their product are dropped too, since no result could be correct.

    Args:
        catalog: Joined catalogue.
        own: What the sources hold out themselves, see :func:`own_splits`.
    """
    dropped: list[Repeat] = []
    for column, kind in (("sha256", "dropped"), ("product", "dropped, product")):
        values = image_keys(catalog.table) if column == "sha256" else catalog.table["product"].to_pylist()
        distinct, codes = encode(values)
        splits = split_codes(catalog.table)
        own_codes = np.array([own[column].get(value, 0) for value in distinct], dtype=np.int64)[codes]
        is_overlap = find_overlap(codes, splits, (own_codes == splits) & (own_codes > 0))
        dropped += _list_overlap(catalog, codes, splits, is_overlap, kind)
        catalog = catalog.where(~is_overlap)
    # After the others: images of these queries stay out of training, since their product may get a gallery image later.
    catalog, unanswerable = _drop_unanswerable(catalog)
    return catalog, dropped + unanswerable


def drop_untrue_rows(catalog: Catalog) -> tuple[Catalog, list[Repeat]]:
    """Drop held-out rows that make recall untrue; list them as (image, other name, kind).

    These are images that the sources put under several products, and queries that equal a gallery image of their split.
    Each source alone has none. Training images under several products stay, as sources may name a product differently.

    Raises:
        UserError: No query of a split is left.
    """
    conflicts, _ = find_conflicts(catalog.table)
    is_conflict = np.isin(np.arange(len(catalog)), list(conflicts)) & (split_codes(catalog.table) > TRAIN)
    rows = catalog.table.filter(pa.array(is_conflict))
    pairs = zip(rows["image"].to_pylist(), rows["product"].to_pylist(), strict=True)
    dropped = [(image, product, "dropped, several products") for image, product in pairs]
    catalog = catalog.where(~is_conflict)
    is_twin, twins, _ = find_twins(catalog.table)
    dropped += [(image, reason.removeprefix(TWIN), "dropped, equals gallery") for image, reason in twins]
    catalog, unanswerable = _drop_unanswerable(catalog.where(~np.array(is_twin, dtype=np.bool_)))
    return catalog, dropped + unanswerable


def _drop_unanswerable(catalog: Catalog) -> tuple[Catalog, list[Repeat]]:
    """Drop held-out queries without a gallery image of their product; list them."""
    is_unanswerable = _queries_without_gallery(catalog, "validation") | _queries_without_gallery(catalog, "test")
    rows = catalog.table.filter(pa.array(is_unanswerable))
    pairs = zip(rows["image"].to_pylist(), rows["product"].to_pylist(), strict=True)
    return catalog.where(~is_unanswerable), [(image, product, "dropped, no gallery") for image, product in pairs]


def _list_overlap(
    catalog: Catalog, codes: NDArray[np.int64], splits: NDArray[np.int64], is_overlap: NDArray[np.bool_], kind: str
) -> list[Repeat]:
    """Return the dropped rows, each with the image of a row in another split, or with its product."""
    rows = np.flatnonzero(is_overlap).tolist()
    images, products = catalog.table["image"].to_pylist(), catalog.table["product"].to_pylist()
    if kind == "dropped, product":
        return [(images[row], products[row], kind) for row in rows]
    copies: dict[int, list[int]] = {}
    for row in np.flatnonzero(np.isin(codes, codes[is_overlap])).tolist():
        copies.setdefault(int(codes[row]), []).append(row)
    listed = []
    for row in rows:
        others = [copy for copy in copies[int(codes[row])] if splits[copy] != splits[row]]
        listed.append((images[row], images[max(others, key=splits.__getitem__)], kind))
    return listed


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


def _image_root(config: DataConfig, reader: str, path: Path) -> Path:
    return Path(config.image_root) if reader == "csv" and config.image_root else image_root(reader, str(path))


def _read_source(config: DataConfig, reader: str, path: Path) -> tuple[Division, list[Rejected]]:
    """Return a source's checked and divided images, and its rejected images with the reason."""
    options = config.read_options() if reader == "csv" else ReadOptions()
    log.info(f"{path}: decoding all images ...")
    data = read_data(reader, path, options, config.skip_unreadable, config.skip_invalid_rows)
    shares = shares_of(reader, config.validation, config.test, config.seed, config.resplit)
    division = data.divide(shares)
    for note in data.notes:
        log.info(f"  {note}")
    for problem in division.unmet:
        log.warning(f"{path}: {problem}")
    return division, data.set_aside


def _check_held_out(config: DataConfig, joined: Catalog) -> None:
    """Raise :class:`UserError` if a requested split has nothing to search for, or no image is left to train on."""
    for name, share in (("validation", config.validation), ("test", config.test)):
        if share and not len(joined.select(split=name, role="query")):
            raise UserError(f"{name}: no source has enough products for {share}. Raise it or add images.")
    if not len(joined.select(split="train")):
        raise UserError("validation, test: they leave no product to train on. Lower them or use another --seed.")


def _check_own_queries(
    config: DataConfig, divisions: list[Division], merged: Catalog, joined: Catalog, dropped: list[Repeat]
) -> None:
    """Raise :class:`UserError` if no query is left of a split that a source has itself.

    Args:
        config: Configuration, which names the sources.
        divisions: Division of each source.
        merged: Joined rows of all sources.
        joined: Rows of ``merged`` that are left.
        dropped: Rows of ``merged`` that were dropped, see :func:`drop_split_overlap` and :func:`drop_untrue_rows`.
    """
    sha256 = dict(zip(merged.table["image"].to_pylist(), image_keys(merged.table), strict=True))
    for (_, path), division in zip(config.sources(), divisions, strict=True):
        labelled = Catalog(division.table, path).where(division.table["source"].to_numpy() != UNLABELLED)
        for split in ("validation", "test"):
            own = set(image_keys(labelled.select(split, "query").table)) if split not in division.drawn else set()
            if not own or own & set(image_keys(joined.select(split, "query").table)):
                continue
            examples = (
                f", such as {image} ({kind}: {other})" for image, other, kind in dropped if sha256[image] in own
            )
            problem = f"none of its {len(own)} {split} queries is left{next(examples, '')}"
            raise UserError(
                f"{path}: {problem}. Correct its {split} rows, or leave out the source that contradicts them."
            )


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
    log.info(f"{config.output}: {len(joined)} images, {len(set_aside)} set aside")
    repeated = (
        f"repeated images: {counts['same_bytes']} same bytes, {counts['near_same']} near-same "
        f"({counts['near_same_across_splits']} across splits), {counts['dropped']} rows dropped, since two splits "
        "would share their image or product, or recall would be untrue (listed in duplicates.csv)"
    )
    for line in summary_lines(joined, set_aside, [repeated]):
        log.info(f"  {line}")
