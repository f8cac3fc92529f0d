"""``vpr gallery create | add | update | remove | compact``: each change of the images is one new version, or none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpr.artifacts.card import Embedding
from vpr.artifacts.store import reraise_as_artifact_error
from vpr.artifacts.writer import check_output, write_artifact
from vpr.common.errors import UserError, nearest_names
from vpr.common.log import get_logger
from vpr.data.readers import UNLABELLED
from vpr.data.tables import list_columns, read_table_rows
from vpr.gallery.config import AddConfig, CompactConfig, CreateConfig, RemoveConfig, UpdateConfig, read_columns
from vpr.gallery.gallery import (
    IDS,
    PENDING,
    VECTORS,
    Gallery,
    build_rows,
    bytes_on_disk,
    load_gallery,
    table_schema,
)
from vpr.gallery.metadata import Metadata, read_metadata
from vpr.gallery.store import Snapshot, Store, quote
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.threshold_command import StoredThreshold, load_threshold, threshold_to_json
from vpr.retrieval.threshold_scope import check_gallery_size

Rows = NDArray[np.int64]
log = get_logger(__name__)

_PRODUCTS_READ = 1000  # products in one condition
_PART = 16_384  # images per part of a first version


def create_gallery(config: CreateConfig) -> Path:
    """Create a gallery and fill it with the gallery images of an embeddings artifact.

    Raises:
        UserError: The output or the address has a gallery, ids are there twice, or an input is invalid.
    """
    path = Path(config.output)
    check_output(path, "gallery")
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path}: there is a gallery. Use `vpr gallery add`, or choose another output.")
    embeddings = load_embeddings(config.embeddings)
    columns = read_columns(config.columns)
    metadata = read_metadata(config.metadata, columns)
    rows = select_rows(embeddings, config.split, "embeddings")
    _check_metadata(metadata, config.metadata, embeddings, rows)
    dim = embeddings.vectors.shape[1]
    threshold = load_threshold(config.threshold, embeddings.model, dim) if config.threshold else None
    values: dict[str, Any] = {"columns": list(config.columns), "address": config.address}
    if threshold:
        values["threshold"] = threshold_to_json(threshold)
    with write_artifact(path, "gallery", values, [embeddings.model]) as draft:
        draft.embedding = Embedding(dim=dim, normalised=True, dtype="float32")
        draft.preprocess = embeddings.artifact.card.preprocess
        draft.unlisted |= {VECTORS}
        parts = (build_part(embeddings, rows[start : start + _PART], metadata) for start in range(0, len(rows), _PART))
        store = Store(config.address or str(draft.path / VECTORS))
        store.create((batch for part in parts for batch in part.to_batches()), table_schema(columns, dim))
    products = len(np.unique(embeddings.products[rows]))
    log.info(f"{path}: version 1, {len(rows)} images of {products} products")
    if threshold:
        check_gallery_size(threshold, products)
    return path


def add_images(config: AddConfig) -> Path:
    """Add the gallery images of an embeddings artifact as one version.

    Raises:
        UserError: The embeddings are of another model, or an image is in the gallery.
    """
    gallery = load_gallery(config.gallery)
    embeddings = load_embeddings(config.embeddings)
    rows = select_rows(embeddings, config.split, "embeddings")
    metadata = read_metadata(config.metadata, gallery.columns)
    _check_metadata(metadata, config.metadata, embeddings, rows)
    with gallery.lock():
        snapshot = gallery.snapshot()  # its model may have changed while another process held the lock
        gallery.check_model(embeddings, "embeddings", snapshot)
        new = build_part(embeddings, rows, metadata, gallery.model_of(snapshot).is_migrated)
        is_present = pc.is_in(_keys(new), value_set=_keys(snapshot.read(IDS))).to_numpy(zero_copy_only=False)
        if len(present := rows[is_present]):
            name = _name(embeddings.products[present[0]], embeddings.images[present[0]])
            problem = f"{name} is in the gallery ({len(present)} of {len(rows)} are)"
            raise UserError(f"embeddings: {config.embeddings}: {problem}. Use `vpr gallery update`.")
        gallery.store.append(new)
        _check_size(config.gallery)
        return _announce(gallery, f"{len(rows)} images added")


def update_images(config: UpdateConfig) -> Path:
    """Replace images, or metadata, as one version; and the threshold.

    Raises:
        UserError: The embeddings or the threshold are of another model, or the metadata are of unknown products.
    """
    if not (config.embeddings or config.metadata or config.threshold):
        raise UserError("update: nothing to change. Set --embeddings, --metadata or --threshold.")
    gallery = load_gallery(config.gallery)
    metadata = read_metadata(config.metadata, gallery.columns)
    if config.embeddings:
        embeddings = load_embeddings(config.embeddings)
        rows = select_rows(embeddings, config.split, "embeddings")
        _check_metadata(metadata, config.metadata, embeddings, rows)
    with gallery.lock():
        snapshot = gallery.snapshot()
        model = gallery.model_of(snapshot)
        threshold = load_threshold(config.threshold, model.model, model.dim) if config.threshold else None
        if config.embeddings:
            gallery.check_model(embeddings, "embeddings", snapshot)
            new = build_part(embeddings, rows, metadata, model.is_migrated)
            cleared = 0 if config.metadata else _count_metadata(snapshot, new, list(gallery.columns))
            gallery.store.replace(new, IDS)
            if cleared:
                log.info(f"metadata of {cleared} images cleared; give --metadata to keep values")
        elif config.metadata:
            described = _rows_with(snapshot, metadata, config.metadata, config.skip_missing)
            if len(described):
                gallery.store.replace(described, IDS)
        if threshold:
            _store_threshold(load_gallery(config.gallery), threshold)
        _check_size(config.gallery)
        return _announce(gallery, "updated")


def remove_images(config: RemoveConfig) -> Path:
    """Remove products or images as one version; their files are removed by :func:`compact_gallery`.

    Raises:
        UserError: The gallery does not have a product or an image.
    """
    if not (config.products or config.images or config.table):
        raise UserError("remove: nothing to remove. Set --products, --images or --table.")
    gallery = load_gallery(config.gallery)
    listed = _read_ids(config.table) if config.table else {name: [] for name in IDS}
    wanted = {"product": [*config.products, *listed["product"]], "image": [*config.images, *listed["image"]]}
    with gallery.lock():
        present = gallery.snapshot().read(IDS)
        conditions, removed = [], pa.array(np.zeros(len(present), dtype=bool))
        for name, values in wanted.items():
            known = pc.is_in(pa.array(values, pa.string()), value_set=present[name].combine_chunks()).to_pylist()
            missing = [value for value, is_known in zip(values, known, strict=True) if not is_known]
            if missing and not config.skip_missing:
                near = nearest_names(missing[0], present[name].slice(0, 10_000).to_pylist()) or "none"
                problem = f"no {name} '{missing[0]}' in the gallery ({len(missing)} unknown)"
                raise UserError(f"remove: {problem}. The nearest are {near}. Correct it, or set --skip-missing.")
            if found := sorted({value for value, is_known in zip(values, known, strict=True) if is_known}):
                conditions.append(f"{name} IN ({quote(found)})")
                removed = pc.or_(removed, pc.is_in(present[name].combine_chunks(), value_set=pa.array(found)))
        count = pc.sum(removed).as_py() or 0
        if count:
            gallery.store.delete(" OR ".join(conditions))
        return _announce(gallery, f"{count} images removed")


def compact_gallery(config: CompactConfig) -> Path:
    """Rewrite the files without removed images and older versions; optionally build an index.

    Nothing of a removed image stays in the gallery's files. Readers of older versions have to open the newest one.

    Raises:
        UserError: The index has more partitions than the gallery has images; nothing is changed.
    """
    gallery = load_gallery(config.gallery)
    with gallery.lock():
        before = bytes_on_disk(gallery.path)
        gallery.snapshot()  # rejects a table that contradicts the card before its files are replaced
        gallery.store.rewrite(config.index)
        sizes = "" if gallery.address else f", {before / 1e6:.1f} -> {bytes_on_disk(gallery.path) / 1e6:.1f} MB"
        return _announce(gallery, f"compacted{sizes}")


def select_rows(embeddings: Embeddings, split: str, key: str) -> Rows:
    """Return the gallery rows of a split, or all gallery rows.

    A split without such rows, as the training split, gives all its rows but queries.

    Raises:
        UserError: There are no such rows, an image has no product, or an id is there twice.
    """
    path = embeddings.artifact.path
    with reraise_as_artifact_error(embeddings.artifact):
        table = pq.read_table(embeddings.artifact.file("rows.parquet"), columns=["split", "source"])
    if not split:
        rows = embeddings.gallery_rows()
    else:
        column = table["split"]
        is_chosen = np.array([name or "" for name in column.to_pylist()], dtype=np.str_) == split
        gallery = np.flatnonzero(is_chosen & (embeddings.roles == "gallery"))
        rows = gallery if len(gallery) else np.flatnonzero(is_chosen & (embeddings.roles != "query"))
    if not len(rows):
        raise UserError(f"split: {path} has no gallery images in split '{split}'. Leave out --split.")
    is_unlabelled = np.array([name == UNLABELLED for name in table["source"].to_pylist()], dtype=bool)
    if unlabelled := int(is_unlabelled[rows].sum()):
        problem = f"{unlabelled} images have no product"
        raise UserError(f"{key}: {path}: {problem}. Build their catalogue with --reader folder or csv.")
    counts = Counter(zip(embeddings.products[rows].tolist(), embeddings.images[rows].tolist(), strict=True))
    if len(counts) < len(rows):
        name = _name(*counts.most_common(1)[0][0])
        raise UserError(f"{key}: {path}: {name} is there twice. Remove one row from the catalogue and embed again.")
    return rows


def build_part(embeddings: Embeddings, rows: Rows, metadata: Metadata, is_migrated: bool = False) -> pa.Table:
    """Return rows of embeddings as rows of a gallery's table."""
    products, images = embeddings.products[rows].tolist(), embeddings.images[rows].tolist()
    return build_rows(products, images, embeddings.vectors[rows], metadata, is_migrated)


def _check_metadata(metadata: Metadata, path: str, embeddings: Embeddings, rows: Rows) -> None:
    """Raise :class:`UserError` if a table has rows, and none is of these rows of embeddings."""
    products, images = embeddings.products[rows].tolist(), embeddings.images[rows].tolist()
    metadata.count_known(products, images, path, embeddings.artifact.path)


def _store_threshold(gallery: Gallery, threshold: StoredThreshold) -> None:
    """Store a threshold of the newest version's model; warn if vectors of an adapter are among those it compares."""
    snapshot = gallery.snapshot()
    model = gallery.model_of(snapshot)
    if model.is_migrated and (pending := snapshot.count(PENDING)):
        problem = f"{pending} of {len(snapshot)} images have vectors of the adapter, for which it was not confirmed"
        log.warning(f"threshold: {problem}. Finish `vpr gallery migrate`.")
    gallery.store_threshold(threshold, model)


def _check_size(path: str) -> None:
    """Warn if the newest version has many more products than the gallery that its threshold was confirmed with."""
    gallery = load_gallery(path)  # read again, because its threshold may have changed
    snapshot = gallery.snapshot()
    gallery.check_size(snapshot, gallery.threshold(snapshot))


def _count_metadata(snapshot: Snapshot, new: pa.Table, columns: list[str]) -> int:
    """Return the number of stored images with metadata that new rows replace."""
    if not columns:
        return 0
    stored = snapshot.read([*IDS, *columns])
    is_replaced = pc.is_in(_keys(stored), value_set=_keys(new)).to_numpy(zero_copy_only=False)
    has_values = np.any([stored[name].is_valid().to_numpy() for name in columns], axis=0)
    return int((is_replaced & has_values).sum())


def _rows_with(snapshot: Snapshot, metadata: Metadata, path: str, skip_missing: bool) -> pa.Table:
    """Return the stored rows of the metadata's products or images with these metadata."""
    known = set(snapshot.read(["product"])["product"].to_pylist())
    products = sorted({product for product, _ in metadata.values} & known)
    names = snapshot.schema.names
    starts = range(0, len(products) or 1, _PRODUCTS_READ)
    wanted = (f"product IN ({quote(products[start : start + _PRODUCTS_READ] or [''])})" for start in starts)
    stored = pa.concat_tables([snapshot.read(names, where).select(names) for where in wanted]).combine_chunks()
    found = {(product, "") for product in stored["product"].to_pylist()}
    keys = list(zip(stored["product"].to_pylist(), stored["image"].to_pylist(), strict=True))
    images = set(keys)
    unknown = [key for key in metadata.values if key not in found and key not in images]
    if unknown and not skip_missing:
        problem = f"the gallery has no {_name(*unknown[0])} ({len(unknown)} unknown)"
        raise UserError(f"metadata: {path}: {problem}. Remove the row, or set --skip-missing.")
    used = [metadata.find(*key) is not None for key in keys]
    chosen = stored.filter(pa.array(used, pa.bool_()))
    values = metadata.arrays(chosen["product"].to_pylist(), chosen["image"].to_pylist())
    columns = {name: values.get(name, chosen[name]) for name in names}
    return pa.table(columns, schema=snapshot.schema)


def _read_ids(path: str) -> dict[str, list[str]]:
    """Return the values of a table's column ``product`` or ``image``; an ``image`` column is the more exact one."""
    found = {column.strip().casefold() for column in list_columns(Path(path))}
    name = "image" if "image" in found else "product"
    return {other: [] for other in IDS} | {name: [row[name] for _, row in read_table_rows(Path(path), [name])]}


def _keys(table: pa.Table) -> pa.Array:
    """Return one text for the ids of each row."""
    products, images = table["product"].combine_chunks(), table["image"].combine_chunks()
    lengths = pc.cast(pc.utf8_length(products), pa.string())
    return pc.binary_join_element_wise(lengths, pa.scalar(":"), products, images, "")


def _name(product: str, image: str) -> str:
    return f"image '{image}' of product '{product}'" if image else f"product '{product}'"


def _announce(gallery: Gallery, what: str) -> Path:
    snapshot = gallery.snapshot()
    log.info(f"{gallery.path}: version {snapshot.version}, {len(snapshot)} images, {what}")
    return gallery.path
