"""``vpr gallery info | verify | export``: counts, checks, and the hand-off to commands that read embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vpr.artifacts.card import Embedding
from vpr.artifacts.writer import check_output, write_artifact
from vpr.common.errors import CheckFailed, UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA
from vpr.gallery.config import ExportConfig, InfoConfig, VerifyGalleryConfig
from vpr.gallery.exported import write_exported
from vpr.gallery.gallery import (
    BACKFILL,
    CALIBRATE,
    IDS,
    PENDING,
    VECTORS,
    Gallery,
    bytes_on_disk,
    describe_share,
    digest,
    load_gallery,
    vectors_of,
)
from vpr.gallery.nearest import find_nearest
from vpr.gallery.store import ROW_ID, Snapshot
from vpr.retrieval.embeddings import load_embeddings
from vpr.retrieval.threshold_command import StoredThreshold

log = get_logger(__name__)

_TOLERANCE = 1e-3  # of the length of a vector
_SAME = 1e-4  # largest difference of a value after a migration, which embeds the images in batches of another order
_MAX_NAME = 100  # characters of an id that are shown
_MAX_SHOWN = 5  # problems
_SAMPLED = 100  # stored vectors that are searched with the index
_PROBES = 16
_MIN_FOUND = 0.9  # share of these that must find themselves


def print_info(config: InfoConfig) -> dict[str, Any]:
    """Print and return counts, versions, size and identity of a gallery."""
    gallery = load_gallery(config.gallery)
    snapshot = gallery.snapshot()
    products = snapshot.read(["product"])["product"]
    versions = snapshot.versions()
    threshold, model = gallery.threshold(snapshot), gallery.model_of(snapshot)
    result: dict[str, Any] = {
        "path": str(gallery.path),
        "address": gallery.address or str(gallery.path / VECTORS),
        "version": snapshot.version,
        "versions": [vars(version) for version in versions],
        "images": len(products),
        "products": len(pc.unique(products)),
        "dimensions": model.dim,
        "model": model.model.name,
        "model_sha256": model.model.sha256,
        "migrated_from": model.previous.name if model.previous else None,
        "adapted": snapshot.count(PENDING) if model.is_migrated else 0,
        "columns": dict(gallery.columns),
        "threshold": None if threshold is None else _describe_threshold(threshold),
        "threshold_outgrown": gallery.is_threshold_outgrown(snapshot),
        "index": snapshot.index(),
        "bytes": None if gallery.address else bytes_on_disk(gallery.path),
    }
    _print_info(result)
    gallery.check_size(snapshot, threshold)
    return result


def _describe_threshold(threshold: StoredThreshold) -> dict[str, Any]:
    return {name: getattr(threshold, name) for name in ("score", "value", "gallery_products")}


def _print_info(result: dict[str, Any]) -> None:
    index, threshold, size = result["index"], result["threshold"], result["bytes"]
    columns = ", ".join(f"{name} ({kind})" for name, kind in result["columns"].items())
    no_match = "never"
    if threshold:
        no_match = f"{threshold['score']} below {threshold['value']:.4f}"
        no_match += f", confirmed in a gallery of {threshold['gallery_products']} products"
    if result["threshold_outgrown"]:
        no_match = f"never: the stored threshold is of an earlier model. {CALIBRATE}"
    lines = {
        "version": f"{result['version']} ({len(result['versions'])} stored)",
        "images": f"{result['images']} of {result['products']} products",
        "vectors": f"{result['dimensions']} dimensions, float32, at {result['address']}",
        "model": f"{result['model']} ({result['model_sha256'][:12]})",
        "migration": _describe_migration(result),
        "columns": columns or "none",
        "no match": no_match,
        "index": f"{index['partitions']} partitions, {index['others']} images outside" if index else "none (exact)",
        "size": "at the address" if size is None else f"{size / 1e6:.1f} MB",
    }
    for name, text in lines.items():
        print(f"{name:<9} {text}")


def _describe_migration(result: dict[str, Any]) -> str:
    """Return from which model the gallery was migrated, and the share of images that the new model has embedded."""
    if result["migrated_from"] is None:
        return "none"
    return f"from {result['migrated_from']}, {describe_share(result['images'], result['adapted'])}"


@dataclass
class _Problems:
    """Problems of stored rows: their number, and the first ones."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, text: str, count: int = 1) -> None:
        self.count += count
        if len(self.shown) < _MAX_SHOWN:
            self.shown.append(text)


def verify_gallery(config: VerifyGalleryConfig) -> dict[str, Any]:
    """Check ids, lengths and checksums of all stored vectors, and that the index finds them.

    In a migrated gallery, images with vectors of the adapter are counted and not compared with embeddings.

    Raises:
        CheckFailed: A vector changed since it was added, an id is there twice, or the index misses vectors.
        UserError: The gallery or the embeddings cannot be read, or are of different models.
    """
    gallery = load_gallery(config.gallery)
    snapshot = gallery.snapshot()
    expected = _read_expected(gallery, config.embeddings, snapshot)
    is_migrated = gallery.model_of(snapshot).is_migrated
    problems, seen = _Problems(), set()
    compared = adapted = 0
    for product, image, stored, is_adapted, vector in _rows(snapshot, is_migrated):
        if product is None or image is None or stored is None:
            problems.add("a row has no product, image or checksum")
            continue
        name = f"image '{image[:_MAX_NAME]}' of product '{product[:_MAX_NAME]}'"
        if (product, image) in seen:
            problems.add(f"{name} is there twice")
        seen.add((product, image))
        if not abs(float(np.linalg.norm(vector)) - 1) < _TOLERANCE:
            problems.add(f"{name} has a vector that is not of length 1")
        elif digest(product, image, vector, is_adapted) != stored:
            problems.add(f"{name} changed since it was added")
        adapted += is_adapted
        if (product, image) in expected and not is_adapted:
            compared += 1
            tolerance = _SAME if is_migrated else 0.0
            if not np.allclose(expected[product, image], vector, rtol=0, atol=tolerance):
                problems.add(f"{name} has another vector than the embeddings")
    found = _check_index(snapshot, problems)
    result = {"version": snapshot.version, "images": len(seen), "compared": compared, "index_found": found}
    result["adapted"] = adapted
    if problems.count:
        fix = "Run `vpr gallery update` with their embeddings, or `vpr gallery compact` if it is the index"
        text = "; ".join(problems.shown)
        raise CheckFailed(f"{gallery.path}: version {snapshot.version}: {problems.count} problems: {text}. {fix}.")
    note = f", {adapted} of them of the adapter" if adapted else ""
    log.info(f"{gallery.path}: version {snapshot.version}, {len(seen)} images have the vectors that were added{note}")
    return result


def _rows(
    snapshot: Snapshot, is_migrated: bool
) -> Iterator[tuple[str | None, str | None, int | None, bool, np.ndarray[Any, np.dtype[np.float32]]]]:
    names = [*IDS, "digest", *([BACKFILL] if is_migrated else [])]
    for batch in snapshot.batches([*names, "vector"]):
        columns = [batch[name].to_pylist() for name in (*IDS, "digest")]
        places = batch[BACKFILL].to_pylist() if is_migrated else [None] * batch.num_rows
        yield from zip(*columns, (place is not None for place in places), vectors_of(batch), strict=True)


def _read_expected(
    gallery: Gallery, paths: tuple[str, ...], snapshot: Snapshot
) -> dict[tuple[str, str], np.ndarray[Any, np.dtype[np.float32]]]:
    expected: dict[tuple[str, str], np.ndarray[Any, np.dtype[np.float32]]] = {}
    for path in paths:
        embeddings = load_embeddings(path)
        gallery.check_model(embeddings, "embeddings", snapshot)
        rows = embeddings.rows_with_role("gallery")
        keys = zip(embeddings.products[rows].tolist(), embeddings.images[rows].tolist(), strict=True)
        expected |= dict(zip(keys, embeddings.vectors[rows], strict=True))
    return expected


def _check_index(snapshot: Snapshot, problems: _Problems) -> float | None:
    """Return the share of sampled vectors that find themselves by the index; None without an index."""
    if snapshot.index() is None or not len(snapshot):
        return None
    ids = snapshot.read(["product"])[ROW_ID].to_numpy()
    sampled = np.random.default_rng(0).choice(ids, min(_SAMPLED, len(ids)), replace=False)
    vectors = vectors_of(snapshot.take(sampled, ["vector"]))
    best = find_nearest(snapshot, vectors, 1, probes=_PROBES).scores[:, 0]
    found = float(np.mean(best > 1 - _TOLERANCE))
    if found < _MIN_FOUND:
        problems.add(f"the index finds {found:.0%} of {len(sampled)} stored vectors")
    return found


def export_embeddings(config: ExportConfig) -> Path:
    """Write a gallery's images as embeddings of the gallery's model, sorted by product and image.

    ``vpr export serving --gallery`` writes a faiss index of them, ``vpr search`` and ``vpr bench storage`` read them.
    The gallery's threshold and metadata are stored with them, for ``vpr export serving``.

    Raises:
        UserError: The condition is invalid or no image fulfils it.
    """
    gallery = load_gallery(config.gallery)
    check_output(config.output, "embeddings")
    snapshot = gallery.snapshot()
    names = [*IDS, *gallery.columns, "vector"]
    table = snapshot.read(names, config.where).sort_by([(name, "ascending") for name in IDS])
    if not len(table):
        raise UserError(f"where: {gallery.path} has no such images. Change the condition.")
    model = gallery.model_of(snapshot)
    adapted = snapshot.count(PENDING) if model.is_migrated else 0
    if adapted:
        log.warning(f"{gallery.path}: {adapted} images have vectors of the adapter. Finish `vpr gallery migrate`.")
    values = {"gallery": gallery.artifact.card.name, "version": snapshot.version, "where": config.where}
    with write_artifact(config.output, "embeddings", values, [model.model]) as draft:
        np.save(draft.path / "vectors.npy", vectors_of(table), allow_pickle=False)
        empty = {name: pa.nulls(len(table), SCHEMA.field(name).type) for name in SCHEMA.names}
        roles = pa.array(["gallery"] * len(table))
        columns = {**empty, "image": table["image"], "product": table["product"], "role": roles}
        pq.write_table(pa.table(columns, schema=SCHEMA), draft.path / "rows.parquet")
        metadata = table.select(list(gallery.columns)).replace_schema_metadata() if gallery.columns else None
        write_exported(draft.path, gallery.threshold(snapshot), metadata, config.where)
        draft.embedding = Embedding(dim=model.dim, normalised=True, dtype="float32")
        draft.preprocess = model.preprocess
        draft.metrics = {"set_aside": 0, "adapted": adapted}
    log.info(f"{config.output}: {len(table)} images of version {snapshot.version}")
    return Path(config.output)
