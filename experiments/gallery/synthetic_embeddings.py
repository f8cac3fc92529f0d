"""Embeddings of synthetic products, with the spectrum of a trained model's, for galleries of a million vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpr.artifacts.card import Embedding
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.seen import record_seen
from vpr.retrieval.embeddings import l2_normalize, write_embeddings


@dataclass(frozen=True)
class SyntheticProducts:
    """Products as clusters.

    Attributes:
        dim: Dimensions of the vectors.
        training: Number of training products, of 4 gallery images each.
        validation: Number of validation products, of 4 query and 2 gallery images each.
        test: Number of test products, of the same images.
        noise: Share of the variance that differs between the images of a product.
        decay: Power with which the variance falls from one principal direction to the next.
        seed: Seed of the vectors.
    """

    dim: int = 256
    training: int = 20_000
    validation: int = 900
    test: int = 400
    noise: float = 0.45
    decay: float = 1.0
    seed: int = 0


_ROLES = {"train": ("gallery",) * 4}
_SCORED_ROLES = ("query",) * 4 + ("gallery",) * 2


def write_synthetic_embeddings(folder: Path, products: SyntheticProducts, distortion: float = 0.0) -> Path:
    """Write an embeddings artifact and its model, which holds no weights.

    ``distortion`` is the share of the variance that another model changes: two artifacts of the same products with
    different distortions are embeddings of the same images by two models.
    """
    rng = np.random.default_rng(products.seed)
    scale = np.arange(1, products.dim + 1) ** (-products.decay / 2)
    rotation = np.linalg.qr(rng.standard_normal((products.dim, products.dim)))[0]
    rows: list[dict[str, str]] = []
    parts: list[NDArray[np.float32]] = []
    for split, count in (("train", products.training), ("validation", products.validation), ("test", products.test)):
        roles = _ROLES.get(split, _SCORED_ROLES)
        centres = rng.standard_normal((count, 1, products.dim))
        views = rng.standard_normal((count, len(roles), products.dim))
        changed = np.random.default_rng([products.seed, 1]).standard_normal(views.shape)
        mixed = np.sqrt(1 - products.noise) * centres + np.sqrt(products.noise) * views
        mixed = np.sqrt(1 - distortion) * mixed + np.sqrt(distortion) * changed
        vectors = (mixed * scale).reshape(-1, products.dim) @ rotation
        parts.append(l2_normalize(vectors.astype(np.float32)))
        for product in range(count):
            names = (f"{split}-{product}", split)
            rows += [_row(*names, view, role) for view, role in enumerate(roles)]
    name = f"synthetic-{distortion:g}"
    with write_artifact(folder / f"{name}-model", "student", {"distortion": distortion}) as draft:
        record_seen(draft.path, [])
        draft.embedding = Embedding(dim=products.dim, normalised=True, dtype="float32")
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), folder)
    model = load_artifact(folder / f"{name}-model")
    return write_embeddings(str(folder / name), np.concatenate(parts), catalog, model, {})


def _row(product: str, split: str, view: int, role: str) -> dict[str, str]:
    return {"image": f"{product}/{view}.jpg", "product": product, "role": role, "split": split}
