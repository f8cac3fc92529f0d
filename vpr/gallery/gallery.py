"""A gallery: an artifact whose card has the identity of the model, and a table of vectors that changes.

The card is fixed, except for the threshold. Every version is therefore one version of the table.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from vpr.artifacts.card import Parent
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.run_folder import atomic_write
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.common.locks import file_lock
from vpr.gallery.config import check_address, read_columns
from vpr.gallery.metadata import Metadata, metadata_fields
from vpr.gallery.store import Snapshot, Store, Vectors
from vpr.retrieval.config import ScoreName
from vpr.retrieval.embeddings import Embeddings
from vpr.retrieval.open_set import probability_from_json, probability_to_json
from vpr.retrieval.threshold_command import StoredThreshold

IDS = ("product", "image")
VECTORS = "vectors"  # folder of the table
_LOCK = ".writer.lock"


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
    def model(self) -> Parent:
        """Model of all vectors."""
        return self.artifact.parents("model")[0]

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        assert self.artifact.card.embedding is not None
        return self.artifact.card.embedding.dim

    @property
    def store(self) -> Store:
        """Table of the vectors."""
        return Store(self.address or str(self.path / VECTORS))

    def snapshot(self, version: int = 0) -> Snapshot:
        """Open a version, 0 for the newest; raise :class:`UserError` if the table contradicts the card."""
        snapshot = self.store.open(version)
        if snapshot.schema.remove_metadata() != table_schema(self.columns, self.dim):
            problem = f"version {snapshot.version} has other columns or another dimension than the card"
            raise UserError(f"{self.path}: {problem}. Restore the gallery, or create it again.")
        return snapshot

    def threshold(self) -> StoredThreshold | None:
        """Return the stored threshold of "no match", if there is one."""
        values = self.artifact.card.config.get("threshold")
        if values is None:
            return None
        with reraise_as_artifact_error(self.artifact):
            score, value = values["score"], float(values["value"])
            if score not in get_args(ScoreName) or not np.isfinite(value):
                raise ValueError("unknown score or threshold")
            probability = probability_from_json(values["probability"])
            return StoredThreshold(score, value, probability, int(values["gallery_products"]))

    def store_threshold(self, threshold: StoredThreshold) -> None:
        """Replace the stored threshold; the card is written atomically."""
        config = {**self.artifact.card.config, "threshold": threshold_to_json(threshold)}
        card = self.artifact.card.model_copy(update={"config": config})
        with atomic_write(self.path / CARD_NAME, "w") as stream:
            stream.write(card.model_dump_json(by_alias=True, indent=1) + "\n")

    def check_model(self, embeddings: Embeddings, key: str) -> None:
        """Raise :class:`UserError` if the embeddings are of another model or dimension."""
        where, model = f"{key}: {embeddings.artifact.path}", embeddings.model
        if model.sha256 != self.model.sha256:
            problem = f"embedded with '{model.name}', the gallery with '{self.model.name}'"
            fix = "Embed with the gallery's model, or run `vpr gallery create` with these embeddings"
            raise UserError(f"{where}: {problem}. {fix}.")
        if embeddings.vectors.shape[1] != self.dim:
            problem = f"{embeddings.vectors.shape[1]} dimensions, the gallery has {self.dim}"
            raise UserError(f"{where}: {problem}. Embed again with the gallery's model.")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclude other writers on this machine or file system; readers do not wait."""
        with file_lock(self.path / _LOCK):
            yield


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


def table_schema(columns: Mapping[str, str], dim: int) -> pa.Schema:
    """Return the schema of a gallery's table."""
    ids = [pa.field(name, pa.string()) for name in IDS]
    vector = pa.field("vector", pa.list_(pa.float32(), dim))
    return pa.schema([*ids, *metadata_fields(columns), pa.field("digest", pa.int64()), vector])


def build_rows(products: Sequence[str], images: Sequence[str], vectors: Vectors, metadata: Metadata) -> pa.Table:
    """Return rows of a gallery's table; ``vectors`` are (n, dim) float32."""
    values = {
        "product": pa.array(products, pa.string()),
        "image": pa.array(images, pa.string()),
        **metadata.arrays(products, images),
        "digest": pa.array([digest(*row) for row in zip(products, images, vectors, strict=True)], pa.int64()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1]),
    }
    return pa.table(values, schema=table_schema(metadata.columns, vectors.shape[1]))


def digest(product: str, image: str, vector: Vectors) -> int:
    """Return a signed checksum of 64 bits of an image's ids and its (dim,) float32 vector."""
    content = f"{len(product)}:{product}{image}\0".encode() + np.ascontiguousarray(vector).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def vectors_of(batch: pa.RecordBatch | pa.Table) -> Vectors:
    """Return the (n, dim) float32 vectors of rows."""
    column = batch["vector"]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    # `flatten` respects the slice of an array, and leaves out null lists.
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def threshold_to_json(threshold: StoredThreshold) -> dict[str, Any]:
    """Return a threshold as JSON."""
    values = {"score": threshold.score, "value": threshold.value, "gallery_products": threshold.gallery_products}
    return {**values, "probability": probability_to_json(threshold.probability)}


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
