"""Threshold and metadata of a gallery in the embeddings that ``vpr gallery export`` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vpr.artifacts.store import reraise_as_artifact_error
from vpr.common.log import get_logger
from vpr.retrieval.embeddings import Embeddings
from vpr.retrieval.threshold_command import StoredThreshold, threshold_from_json, threshold_to_json

log = get_logger(__name__)

THRESHOLD, METADATA = "threshold.json", "metadata.parquet"


def write_exported(folder: Path, threshold: StoredThreshold | None, metadata: pa.Table | None, where: str) -> None:
    """Write a gallery's threshold and (images, columns) metadata, if there are any.

    Products that a condition leaves out no longer count for the margin. So a part of the gallery keeps a threshold of
    the similarity only.

    Args:
        folder: Folder of the embeddings.
        threshold: Threshold of the exported model.
        metadata: Metadata in the order of the embeddings.
        where: Condition on the exported images; empty for all images.
    """
    if threshold and where and threshold.score != "similarity":
        problem = f"its {threshold.score} may rise in a part of the gallery, so it was not exported"
        log.warning(f"threshold: {problem}. Leave out --where, or use a threshold of --score similarity.")
    elif threshold:
        (folder / THRESHOLD).write_text(json.dumps(threshold_to_json(threshold), indent=1), encoding="utf-8")
    if metadata is not None:
        pq.write_table(metadata, folder / METADATA)


def read_exported_threshold(embeddings: Embeddings) -> StoredThreshold | None:
    """Return the threshold of the gallery that embeddings were exported from, if it had one."""
    artifact = embeddings.artifact
    if THRESHOLD not in artifact.card.files:
        return None
    with reraise_as_artifact_error(artifact):
        return threshold_from_json(json.loads(artifact.file(THRESHOLD).read_text(encoding="utf-8")))


def read_exported_metadata(embeddings: Embeddings) -> pa.Table | None:
    """Return the metadata of the gallery that embeddings were exported from, in their order, if it had columns."""
    artifact = embeddings.artifact
    if METADATA not in artifact.card.files:
        return None
    with reraise_as_artifact_error(artifact):
        table = pq.read_table(artifact.file(METADATA))
        if len(table) != len(embeddings.images):
            raise ValueError(f"{METADATA} has {len(table)} rows for {len(embeddings.images)} images")
    return table
