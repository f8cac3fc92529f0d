"""Optional parts of a hand-off: a threshold of "no match", metadata and a confirmed storage setting of the index."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from export.config import ServingConfig
from vpr.artifacts.card import Parent
from vpr.artifacts.store import Artifact, file_sha256, load_artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.gallery.config import read_columns
from vpr.gallery.exported import read_exported_metadata, read_exported_threshold
from vpr.gallery.metadata import read_metadata
from vpr.retrieval.confirmed_storage import ConfirmedStorage, load_confirmed_storage, load_training
from vpr.retrieval.embeddings import Embeddings
from vpr.retrieval.threshold_command import StoredThreshold, load_threshold, threshold_to_json
from vpr.retrieval.threshold_scope import check_gallery_size
from vpr.retrieval.vector_index import Vectors

log = get_logger(__name__)


@dataclass(frozen=True)
class NoMatch:
    """Threshold of "no match" for the gallery of a hand-off.

    Attributes:
        threshold: Confirmed threshold.
        model: Name of the model that it was confirmed for.
        products: Number of products in the gallery.
        results: Number of results in which there is one of another product than the best one.
        may_miss: Whether the index may miss the second product, which the score needs.
    """

    threshold: StoredThreshold
    model: str
    products: int
    results: int
    may_miss: bool

    def to_json(self) -> dict[str, Any]:
        """Return the values of ``threshold.json``, which a client without this toolkit reads."""
        stored = threshold_to_json(self.threshold)
        values = {"score": stored.pop("score"), "threshold": stored.pop("value"), **stored}
        return {**values, "model": self.model, "products": self.products, "results": self.results}


@dataclass(frozen=True)
class StoredIndex:
    """Confirmed storage setting, and the (m, D) training vectors that it is fitted on."""

    storage: ConfirmedStorage
    training: Vectors

    @property
    def is_exact(self) -> bool:
        """Whether the index finds the exact neighbours."""
        setting = self.storage.setting
        return (setting.reduction, setting.format, setting.index) == (None, "float32", "flat")

    def build(self, vectors: Vectors) -> Any:
        """Return a faiss index of (n, D) unit vectors."""
        return self.storage.build(self.training, vectors)


@dataclass(frozen=True)
class Handoff:
    """Optional parts of a hand-off; each is None without it.

    Attributes:
        no_match: Threshold of "no match".
        metadata: Metadata in the order of the gallery's images.
        index: Storage setting of the index.
        parents: Artifacts that the parts come from.
        checksums: Checksums of the files that the parts come from, for the card.
    """

    no_match: NoMatch | None = None
    metadata: pa.Table | None = None
    index: StoredIndex | None = None
    parents: list[Parent] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Names of the metadata columns."""
        return [] if self.metadata is None else self.metadata.column_names

    def write(self, folder: Path) -> None:
        """Write ``threshold.json``, and ``metadata.parquet`` next to the gallery."""
        if self.metadata is not None:
            pq.write_table(self.metadata, folder / "gallery" / "metadata.parquet")
        if self.no_match:
            text = json.dumps(self.no_match.to_json(), indent=1)
            (folder / "threshold.json").write_text(text, encoding="utf-8")


def load_handoff(config: ServingConfig, model: Artifact, gallery: Embeddings) -> Handoff:
    """Load the optional parts that the configuration and an exported gallery name.

    Raises:
        UserError: A part is broken, or does not fit the gallery.
    """
    index = load_stored_index(config, gallery) if config.storage else None
    is_exact = index.is_exact if index else config.index == "flat"
    no_match = load_no_match(config, gallery, is_exact)
    _check_server(model, gallery, {"threshold": no_match, "storage": index})
    metadata = load_served_metadata(config, gallery)
    parents = [load_artifact(config.threshold).as_parent("threshold")] if config.threshold else []
    parents += [index.storage.artifact.as_parent("storage")] if index else []
    checksums = {"metadata_sha256": file_sha256(Path(config.metadata))} if config.metadata else {}
    return Handoff(no_match, metadata, index, parents, checksums)


def _check_server(model: Artifact, gallery: Embeddings, parts: dict[str, object]) -> None:
    """Warn if parts were confirmed for queries of another model than the served one."""
    if gallery.model.sha256 == model.sha256:
        return
    for key, part in parts.items():
        if part:
            problem = (
                f"confirmed for queries of '{gallery.model.name}', the server embeds them with '{model.card.name}'"
            )
            log.warning(f"{key}: {problem}. Confirm it with that model's embeddings of gallery and queries.")


def load_stored_index(config: ServingConfig, gallery: Embeddings) -> StoredIndex:
    """Load the confirmed setting of a gallery as large as this one, and what it is fitted on.

    Raises:
        UserError: The report confirmed no such setting, or the training vectors are not those that it measured.
    """
    images, dim = len(gallery.rows_with_role("gallery")), gallery.vectors.shape[1]
    storage = load_confirmed_storage(config.storage, gallery.model, images, dim)
    return StoredIndex(storage, load_training(storage, gallery, config.training))


def load_no_match(config: ServingConfig, gallery: Embeddings, is_exact: bool) -> NoMatch | None:
    """Return the configured threshold, or the one that the gallery was exported with; None without one.

    Args:
        config: Options of the hand-off.
        gallery: Gallery of the hand-off.
        is_exact: Whether the index finds the exact neighbours.

    Raises:
        UserError: The threshold is of another model or dimension than the gallery, or the gallery has a single product
            and therefore no margin.
    """
    threshold = read_exported_threshold(gallery)
    if config.threshold:
        threshold = load_threshold(config.threshold, gallery.model, gallery.vectors.shape[1])
    if threshold is None:
        return None
    images = np.unique(gallery.products[gallery.rows_with_role("gallery")], return_counts=True)[1]
    if len(images) < 2 and threshold.score != "similarity":
        problem = f"the gallery has a single product, and its {threshold.score} needs two"
        raise UserError(f"threshold: {problem}. Add products, or use a threshold of --score similarity.")
    check_gallery_size(threshold, len(images))
    may_miss = not is_exact and threshold.score != "similarity"
    if may_miss:
        log.warning(
            f"threshold: confirmed with exact search. An index that misses the second product raises the "
            f"{threshold.score}. Use a threshold of --score similarity, or an exact index."
        )
    results = 1 if threshold.score == "similarity" else int(images.max()) + 1
    return NoMatch(threshold, gallery.model.name, len(images), results, may_miss)


def load_served_metadata(config: ServingConfig, gallery: Embeddings) -> pa.Table | None:
    """Return (images, columns) metadata in the order of the gallery's images; None without metadata.

    They are those of ``--metadata``, or those of the gallery that was exported.

    Raises:
        UserError: The table is broken, or none of its rows is of an image in the gallery.
    """
    if not config.metadata:
        return read_exported_metadata(gallery)
    rows = gallery.rows_with_role("gallery")
    metadata = read_metadata(config.metadata, read_columns(config.columns))
    products, images = gallery.products[rows].tolist(), gallery.images[rows].tolist()
    known = metadata.count_known(products, images, config.metadata, gallery.artifact.path)
    if not known:
        raise UserError(f"metadata: {config.metadata}: the table has no rows. Add rows, or leave out --metadata.")
    log.info(f"{config.metadata}: values of {known} of {len(rows)} gallery images")
    return pa.table(metadata.arrays(products, images))
