"""Embeddings of a shop that a test makes up."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vpr.artifacts.card import Embedding
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.data.catalog import SCHEMA, Catalog
from vpr.gallery.gallery import IDS, load_gallery, vectors_of
from vpr.gallery.plan import ADAPTERS, FILE
from vpr.retrieval.embeddings import write_embeddings
from vpr.retrieval.open_set import Probability
from vpr.retrieval.threshold_command import FILE as THRESHOLD
from vpr.retrieval.threshold_command import StoredThreshold, threshold_to_json

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


def write_model(folder: Path, name: str, dim: int = DIM) -> Artifact:
    """Write a model that no test runs, if it is not there."""
    weights = folder / name
    if not weights.is_dir():
        with write_artifact(weights, "student", {"name": name}) as draft:
            (draft.path / "weights").write_text(name)
            draft.embedding = Embedding(dim=dim, normalised=True, dtype="float32")
    return load_artifact(weights)


def write_shop(
    path: Path,
    ids: Sequence[Ids],
    vectors: Vectors,
    model: str = "student",
    roles: Sequence[str] = (),
    splits: Sequence[str] = (),
    sources: Sequence[str] = (),
) -> str:
    """Write embeddings of a model, which is written next to them once."""
    weights = write_model(path.parent, model, vectors.shape[1])
    roles, splits = roles or ["gallery"] * len(ids), splits or [""] * len(ids)
    sources = sources or ["csv"] * len(ids)
    rows = [
        {"image": image, "product": product, "role": role, "split": split, "source": source}
        for (product, image), role, split, source in zip(ids, roles, splits, sources, strict=True)
    ]
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), path.parent)
    return str(write_embeddings(str(path), vectors, catalog, weights, {}))


EVEN = Probability(0.0, 0.0, 0.0)  # 0.5 for every image


def write_threshold(path: Path, model: Artifact, threshold: StoredThreshold) -> str:
    """Write a confirmed threshold of a model, as `vpr gallery threshold` does."""
    with write_artifact(path, "threshold", {}, [model.as_parent("model")]) as draft:
        values = {**threshold_to_json(threshold), "threshold": threshold.value, "statement": "confirmed"}
        (draft.path / THRESHOLD).write_text(json.dumps(values))
        draft.embedding = model.card.embedding
    return str(path)


def write_plan(path: Path, old: Artifact, new: Artifact, weight: Vectors, order: str = "random") -> str:
    """Write a plan with a given (old, new) map, as `vpr gallery plan-migration` does."""
    parents = [new.as_parent("model"), old.as_parent("old_model")]
    with write_artifact(path, "migration", {"seed": 0}, parents) as draft:
        bias = np.zeros(weight.shape[1], np.float32)
        save_file({"procrustes.weight": weight, "linear.weight": weight, "linear.bias": bias}, draft.path / ADAPTERS)
        values = {"adapter": "procrustes", "order": order, "old_dim": len(weight)}
        (draft.path / FILE).write_text(json.dumps(values))
        draft.embedding = Embedding(dim=weight.shape[1], normalised=True, dtype="float32")
    return str(path)


def contents(gallery: str, version: int = 0) -> dict[tuple[str, str], tuple[object, ...]]:
    """Return vector and metadata of each image of a version."""
    opened = load_gallery(gallery)
    table = opened.snapshot(version).read([*IDS, *opened.columns, "vector"])
    rows = zip(*(table[name].to_pylist() for name in (*IDS, *opened.columns)), vectors_of(table), strict=True)
    return {(product, image): (*values, vector.tobytes()) for product, image, *values, vector in rows}


def write_table(path: Path, rows: list[tuple[object, ...]]) -> str:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return str(path)
