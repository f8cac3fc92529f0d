"""A gallery: an artifact whose card has the identity of the first model, and a table of vectors that changes.

The card is fixed, except for the threshold. Every version is therefore one version of the table, which records its
model from a migration on (:mod:`vpr.gallery.vector_model`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vpr.artifacts.names import tell_apart
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.run_folder import atomic_write
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.common.locks import file_lock
from vpr.gallery.config import check_address, read_columns
from vpr.gallery.metadata import Metadata, metadata_fields
from vpr.gallery.store import LostFile, Snapshot, Store, Vectors
from vpr.gallery.vector_model import VectorModel, read_vector_model
from vpr.retrieval.embeddings import Embeddings
from vpr.retrieval.threshold_command import StoredThreshold, threshold_from_json, threshold_to_json
from vpr.retrieval.threshold_scope import MAX_GROWTH, check_gallery_size

IDS = ("product", "image")
VECTORS = "vectors"  # folder of the table
# Column of migrated versions: place in the order of embedding, null where the vector is the model's and no adapter's.
BACKFILL = "backfill"
PENDING = f"{BACKFILL} IS NOT NULL"
CALIBRATE = "Calibrate again with `vpr gallery threshold` and the new model's embeddings, then run `vpr gallery update`"
_LOCK = ".writer.lock"
_THREADS = threading.RLock()  # of this process, which a file lock does not exclude
_ATTEMPTS = 5  # of a search, each one on the newest version
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Gallery:
    """An opened gallery.

    Attributes:
        artifact: Artifact with the card.
        columns: Types of the metadata columns by name.
        address: Address of the vectors; empty for the gallery's folder.
    """

    artifact: Artifact
    columns: Mapping[str, str]
    address: str

    @property
    def path(self) -> Path:
        """Folder of the gallery."""
        return self.artifact.path

    @property
    def store(self) -> Store:
        """Table of the vectors; :class:`UserError` if a link leads out of the gallery's folder."""
        if not self.address:
            _reject_links(self.path / VECTORS)
        return Store(self.address or str(self.path / VECTORS))

    def snapshot(self, version: int = 0) -> Snapshot:
        """Open a version, 0 for the newest; raise :class:`UserError` if the table contradicts its model."""
        snapshot = self.store.open(version)
        model = self.model_of(snapshot)
        if snapshot.schema.remove_metadata() != table_schema(self.columns, model.dim, model.is_migrated):
            problem = f"version {snapshot.version} has other columns or another dimension than the card"
            raise UserError(f"{self.path}: {problem}. Restore the gallery, or create it again.")
        return snapshot

    def search_newest(self, search: Callable[[Snapshot], _Result]) -> _Result:
        """Return the result of a function of the newest version; repeat it if another process compacts meanwhile.

        Raises:
            LostFile: A file is missing in each attempt.
        """
        for _ in range(_ATTEMPTS - 1):
            with suppress(LostFile):
                return search(self.snapshot())
        return search(self.snapshot())

    def model_of(self, snapshot: Snapshot) -> VectorModel:
        """Return the model of a version: that of the last migration before it, or that of the card."""
        if recorded := read_vector_model(snapshot.schema, str(self.path)):
            return recorded
        card = self.artifact.card
        assert card.embedding is not None
        return VectorModel(model=self.artifact.parents("model")[0], dim=card.embedding.dim, preprocess=card.preprocess)

    def threshold(self, snapshot: Snapshot) -> StoredThreshold | None:
        """Return the stored threshold of "no match", if there is one of the version's model."""
        values = self.artifact.card.config.get("threshold")
        if values is None or self.is_threshold_outgrown(snapshot):
            return None
        with reraise_as_artifact_error(self.artifact):
            return threshold_from_json(values)

    def is_threshold_outgrown(self, snapshot: Snapshot) -> bool:
        """Return whether the stored threshold is of another model than the version."""
        values = self.artifact.card.config.get("threshold")
        if not isinstance(values, dict):
            return False
        return values.get("model", self.artifact.parents("model")[0].sha256) != self.model_of(snapshot).model.sha256

    def check_size(self, snapshot: Snapshot, threshold: StoredThreshold | None) -> None:
        """Warn if a version has many more products than the gallery that a threshold was confirmed with."""
        # The number of images needs no reading, and bounds that of the products.
        if threshold and len(snapshot) > MAX_GROWTH * threshold.gallery_products:
            check_gallery_size(threshold, len(pc.unique(snapshot.read(["product"])["product"])))

    def store_threshold(self, threshold: StoredThreshold, model: VectorModel) -> None:
        """Replace the stored threshold by one of a model; the card is written atomically."""
        values = {**threshold_to_json(threshold), "model": model.model.sha256}
        card = self.artifact.card.model_copy(update={"config": {**self.artifact.card.config, "threshold": values}})
        with atomic_write(self.path / CARD_NAME, "w") as stream:
            stream.write(card.model_dump_json(by_alias=True, indent=1) + "\n")

    def check_model(self, embeddings: Embeddings, key: str, snapshot: Snapshot) -> None:
        """Raise :class:`UserError` if the embeddings are of another model or dimension than a version."""
        where, model, own = f"{key}: {embeddings.artifact.path}", embeddings.model, self.model_of(snapshot)
        if model.sha256 != own.model.sha256:
            names = tell_apart(model, own.model)
            problem = f"embedded with {names[0]}, the gallery with {names[1]}"
            if own.previous and own.previous.sha256 == model.sha256:
                state = describe_share(len(snapshot), snapshot.count(PENDING))
                problem = f"embedded with {names[0]}, the gallery was migrated to {names[1]} ({state})"
            fix = "Embed with the gallery's model, or run `vpr gallery create` with these embeddings"
            raise UserError(f"{where}: {problem}. {fix}.")
        if embeddings.vectors.shape[1] != own.dim:
            problem = f"{embeddings.vectors.shape[1]} dimensions, the gallery has {own.dim}"
            raise UserError(f"{where}: {problem}. Embed again with the gallery's model.")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclude other writers on this machine or file system, and other threads; readers do not wait."""
        with _THREADS, file_lock(self.path / _LOCK):
            yield


def describe_share(images: int, pending: int) -> str:
    """Return how many of the images are embedded again."""
    share = 1 - pending / images if images else 1.0
    return f"{images - pending} of {images} images embedded again, {share:.1%}"


def _reject_links(folder: Path) -> None:
    """Raise :class:`UserError` for a symbolic link: a change of the gallery would write or remove what it leads to."""
    for parent, folders, files in os.walk(folder):
        for path in (folder, *(Path(parent, name) for name in (*folders, *files))):
            if path.is_symlink():
                raise UserError(f"{path}: a symbolic link. Galleries hold plain files: restore the gallery.")


def load_gallery(path: Path | str) -> Gallery:
    """Load a gallery's card; raise :class:`UserError` if it is not one."""
    artifact = load_artifact(path, "gallery")
    with reraise_as_artifact_error(artifact):
        config = artifact.card.config
        columns = read_columns(tuple(config["columns"]))
        address = config["address"]
        check_address(address)
        if artifact.card.embedding is None or len(artifact.parents("model")) != 1:
            raise ValueError("the card names no model or dimension")
    return Gallery(artifact, columns, address)


def table_schema(columns: Mapping[str, str], dim: int, is_migrated: bool = False) -> pa.Schema:
    """Return the schema of a gallery's table; a migrated one has the column :data:`BACKFILL`."""
    ids = [pa.field(name, pa.string()) for name in IDS]
    places = [pa.field(BACKFILL, pa.int64())] if is_migrated else []
    vector = pa.field("vector", pa.list_(pa.float32(), dim))
    return pa.schema([*ids, *metadata_fields(columns), *places, pa.field("digest", pa.int64()), vector])


def build_rows(
    products: Sequence[str], images: Sequence[str], vectors: Vectors, metadata: Metadata, is_migrated: bool = False
) -> pa.Table:
    """Return rows of a gallery's table with the model's own (n, dim) float32 vectors."""
    values = {
        "product": pa.array(products, pa.string()),
        "image": pa.array(images, pa.string()),
        **metadata.arrays(products, images),
        **vector_columns(products, images, vectors, [None] * len(products) if is_migrated else None),
    }
    schema = table_schema(metadata.columns, vectors.shape[1], is_migrated)
    return pa.table({name: values[name] for name in schema.names}, schema=schema)


def vector_columns(
    products: Sequence[str], images: Sequence[str], vectors: Vectors, places: Sequence[int | None] | None
) -> dict[str, pa.Array]:
    """Return the columns of (n, dim) float32 vectors, by name.

    Args:
        products: (n,) product ids.
        images: (n,) image ids.
        vectors: (n, dim) vectors.
        places: (n,) values of :data:`BACKFILL`; None leaves out the column.
    """
    rows = zip(products, images, vectors, places or [None] * len(products), strict=True)
    digests = [digest(product, image, vector, place is not None) for product, image, vector, place in rows]
    columns = {
        "digest": pa.array(digests, pa.int64()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1]),
    }
    return columns if places is None else {BACKFILL: pa.array(places, pa.int64()), **columns}


def digest(product: str, image: str, vector: Vectors, is_adapted: bool = False) -> int:
    """Return a signed checksum of 64 bits of an image's ids, its (dim,) float32 vector, and whether it is adapted."""
    content = f"{len(product)}:{product}{image}\0".encode() + np.ascontiguousarray(vector).tobytes()
    content += b"adapted" if is_adapted else b""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def vectors_of(batch: pa.RecordBatch | pa.Table) -> Vectors:
    """Return the (n, dim) float32 vectors of rows."""
    column = batch["vector"]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if column.null_count:
        raise UserError(f"gallery: {column.null_count} images have no vector. Restore the gallery.")
    # `flatten` respects the slice of an array, and leaves out null lists.
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def bytes_on_disk(folder: Path) -> int:
    """Return the size of a folder's files."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(parent, name))
            except FileNotFoundError:  # removed by a writer meanwhile
                continue
    return total
