"""Migration of a gallery to a new model: adapted vectors at first, then vectors of the new model, batch by batch.

The first step writes one version with the adapter's vectors, under the name of the new model. Each later step replaces
some of them and is one version too. What is left to do is stored in the table only (:data:`BACKFILL`), so a migration
that was killed resumes from the newest version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.gallery.gallery import (
    BACKFILL,
    CALIBRATE,
    IDS,
    PENDING,
    Gallery,
    describe_share,
    table_schema,
    vector_columns,
    vectors_of,
)
from vpr.gallery.order import order_rows
from vpr.gallery.plan import Plan
from vpr.gallery.store import ROW_ID, Snapshot, Vectors
from vpr.gallery.vector_model import VectorModel

log = get_logger(__name__)

_COMPACT = "`vpr gallery compact`"


@dataclass(frozen=True)
class Pending:
    """An image whose vector is the adapter's.

    Attributes:
        place: Place in the order in which images are embedded, from 1.
        product: Product id.
        image: Image id.
    """

    place: int
    product: str
    image: str


def is_started(gallery: Gallery, snapshot: Snapshot, plan: Plan) -> bool:
    """Return whether a version has the plan's new model already.

    Raises:
        UserError: The plan is of other models or dimensions than the version, or another migration is unfinished.
    """
    own, target = gallery.model_of(snapshot), plan.target
    if own.model.sha256 == target.model.sha256 and own.dim == target.dim and own.is_migrated:
        return True
    where, models = f"plan: {plan.artifact.path}", f"from '{plan.old.name}' to '{target.model.name}'"
    if own.model.sha256 != plan.old.sha256:
        problem = f"it migrates {models}, the gallery's model is '{own.model.name}'"
        raise UserError(f"{where}: {problem}. Run `vpr gallery plan-migration` with the gallery's model.")
    old_dim = len(plan.adapter.weight)
    if own.dim != old_dim:
        problem = f"it migrates {old_dim} dimensions, the gallery has {own.dim}"
        raise UserError(f"{where}: {problem}. Run `vpr gallery plan-migration` with embeddings like the gallery's.")
    if own.is_migrated and (count := snapshot.count(PENDING)):
        problem = f"{count} images have vectors of the adapter of an earlier migration"
        raise UserError(f"{where}: {problem}. Finish that one, or update these images first.")
    return False


def list_pending(gallery: Gallery, plan: Plan) -> list[Pending]:
    """Return the images to embed in their order: those of an unfinished migration, else all images."""
    with gallery.lock():
        snapshot = gallery.snapshot()
        if not is_started(gallery, snapshot, plan):
            _, places, ids = _place_rows(snapshot, plan)
        else:
            table = snapshot.read([*IDS, BACKFILL], PENDING)
            places, ids = table[BACKFILL].to_numpy(), table.select(IDS)
    columns = (ids[name].to_pylist() for name in IDS)
    found = [Pending(*row) for row in zip(places.tolist(), *columns, strict=True)]
    return sorted(found, key=lambda pending: pending.place)


def start_migration(gallery: Gallery, plan: Plan) -> None:
    """Write the version with the adapter's vectors and the new model, unless the gallery has it."""
    with gallery.lock():
        snapshot = gallery.snapshot()
        if is_started(gallery, snapshot, plan):
            return
        rows, places, _ = _place_rows(snapshot, plan)
        order = np.argsort(rows)
        schema = plan.target.add_to(table_schema(gallery.columns, plan.target.dim, is_migrated=True))
        gallery.store.overwrite(_adapt(gallery, snapshot, plan, rows[order], places[order]), schema)
        after = gallery.snapshot()
        outgrown = gallery.is_threshold_outgrown(after)
    log.info(f"{gallery.path}: version {after.version}, {len(after)} images have vectors of the adapter")
    log.info(f"  queries are those of '{plan.target.model.name}' from now on")
    if outgrown:
        log.warning(f"threshold: the stored one is of '{plan.old.name}' and no longer applies. {CALIBRATE}.")


def replace_adapted(gallery: Gallery, model: VectorModel, images: Sequence[Pending], vectors: Vectors) -> int:
    """Replace the adapter's vectors of images by the new model's, as one version; return their number.

    Images that another process removed or updated meanwhile are left as they are.

    Args:
        gallery: Gallery.
        model: New model.
        images: Images in their order.
        vectors: (images, dim) float32 of unit length.

    Raises:
        UserError: Another process has migrated the gallery to another model meanwhile.
    """
    found = {(image.product, image.image): row for row, image in enumerate(images)}
    with gallery.lock():
        snapshot = gallery.snapshot()
        own = gallery.model_of(snapshot)
        if own.model.sha256 != model.model.sha256:
            problem = f"another process migrated it to '{own.model.name}' meanwhile"
            raise UserError(f"{gallery.path}: {problem}. Plan the migration from that model.")
        names = snapshot.schema.names
        bounds = f"{BACKFILL} >= {images[0].place} AND {BACKFILL} <= {images[-1].place}"
        stored = snapshot.read(names, bounds).select(names).combine_chunks()
        keys = list(zip(*(stored[name].to_pylist() for name in IDS), strict=True))
        used = [row for row, key in enumerate(keys) if key in found]
        if used:
            stored = stored.take(pa.array(used))
            chosen = vectors[[found[keys[row]] for row in used]]
            columns = _with_vectors(stored, chosen, [None] * len(used), names)
            gallery.store.replace(pa.table(columns, schema=snapshot.schema), IDS)
    return len(used)


def log_progress(gallery: Gallery) -> None:
    """Log how many images the new model has embedded."""
    snapshot = gallery.snapshot()
    pending = snapshot.count(PENDING)
    log.info(f"{gallery.path}: version {snapshot.version}, {describe_share(len(snapshot), pending)}")
    if not pending:
        log.info(f"  the migration is complete; {_COMPACT} erases the older versions")


def _place_rows(snapshot: Snapshot, plan: Plan) -> tuple[NDArray[np.uint64], NDArray[np.int64], pa.Table]:
    """Return row ids, (n,) places from 1 in the order of the plan, and ids of all images.

    Every vector passes the adapter here, so that one that it cannot map is found before anything is written.
    """
    lengths, tables = [np.empty(0, np.float32)], []
    for batch in snapshot.batches([*IDS, "vector"]):
        vectors = vectors_of(batch)
        plan.adapter.apply(vectors)
        lengths.append(plan.confidence.lengths(vectors))
        tables.append(pa.table({name: batch[name] for name in (*IDS, ROW_ID)}))
    fields = [*((name, pa.string()) for name in IDS), (ROW_ID, pa.uint64())]
    ids = pa.concat_tables(tables) if tables else pa.schema(fields).empty_table()
    products, images = (ids[name].to_pylist() for name in IDS)
    places = np.empty(len(ids), dtype=np.int64)
    places[order_rows(plan.order, products, images, np.concatenate(lengths), plan.seed)] = np.arange(1, len(ids) + 1)
    return ids[ROW_ID].to_numpy(), places, ids


def _adapt(
    gallery: Gallery, snapshot: Snapshot, plan: Plan, rows: NDArray[np.uint64], places: NDArray[np.int64]
) -> Iterator[pa.RecordBatch]:
    """Yield all rows with the adapter's vectors; ``rows`` are the row ids, ascending, of the ``places``."""
    names = table_schema(gallery.columns, plan.target.dim, is_migrated=True).names
    for batch in snapshot.batches([*IDS, *gallery.columns, "vector"]):
        own = places[np.searchsorted(rows, batch[ROW_ID].to_numpy())]
        columns = _with_vectors(batch, plan.adapter.apply(vectors_of(batch)), own.tolist(), names)
        yield pa.RecordBatch.from_arrays(list(columns.values()), names=names)


def _with_vectors(
    rows: pa.Table | pa.RecordBatch, vectors: Vectors, places: Sequence[int | None], names: Sequence[str]
) -> dict[str, pa.Array]:
    """Return the columns ``names`` of rows with other vectors and places."""
    products, images = (rows[name].to_pylist() for name in IDS)
    new = vector_columns(products, images, vectors, places)
    return {name: new[name] if name in new else rows[name] for name in names}
