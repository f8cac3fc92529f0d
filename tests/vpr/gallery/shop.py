"""Embeddings of a shop that a test makes up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpr.artifacts.card import Embedding
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.data.catalog import SCHEMA, Catalog
from vpr.retrieval.embeddings import write_embeddings

DIM = 8
Vectors = NDArray[np.float32]
Ids = tuple[str, str]  # product, image


def unit_vectors(count: int, dim: int = DIM, seed: int = 0) -> Vectors:
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def name_images(count: int, images: int = 3, first: int = 0) -> list[Ids]:
    """Return ids of so many images, each product has ``images``."""
    return [
        (f"p{first + number // images}", f"{first + number // images}/{number % images}.jpg") for number in range(count)
    ]


def write_shop(
    path: Path, ids: Sequence[Ids], vectors: Vectors, model: str = "student", roles: Sequence[str] = ()
) -> str:
    """Write embeddings of a model, which is written next to them once."""
    weights = path.parent / model
    if not weights.is_dir():
        with write_artifact(weights, "student", {"name": model}) as draft:
            (draft.path / "weights").write_text(model)
            draft.embedding = Embedding(dim=vectors.shape[1], normalised=True, dtype="float32")
    roles = roles or ["gallery"] * len(ids)
    rows = [
        {"image": image, "product": product, "role": role} for (product, image), role in zip(ids, roles, strict=True)
    ]
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), path.parent)
    return str(write_embeddings(str(path), vectors, catalog, load_artifact(weights), {}))
