"""Embeddings of synthetic products in categories, for galleries of a million vectors.

Their parameters are of the kinds that :mod:`experiments.gallery.embedding_statistics` measures on real embeddings, and
`make figures TOPIC=gallery PARTS="embeddings"` measures both. The defaults were chosen by hand: decay and common share
lie between the demo teacher's and those of a network of ImageNet, and the noise was set towards a recall@1 of .859 with
11,316 products, a published score of photographs (Ermolov et al., "Hyperbolic Vision Transformers", CVPR 2022). Their
recall is therefore no evidence.

Synthetic vectors tell the bytes, the time and the build of a setting, and whether the procedure reaches a decision with
so many products. Which setting it chooses depends on the parameters, above all on the decay and the noise. They do not
tell what a model loses on a real catalogue: real categories differ in size and in spectrum, products have variants and
duplicates, and the noise of real images is not independent of the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpr.artifacts.card import Embedding
from vpr.artifacts.run_folder import atomic_save_npy
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError, check_numbers
from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.seen import record_seen
from vpr.retrieval.embeddings import l2_normalize, write_embeddings

Vectors = NDArray[np.float32]
Codes = NDArray[np.int64]


@dataclass(frozen=True)
class SyntheticProducts:
    """Products around the centres of categories, and images around the products.

    An image is the sum of a common direction, its category's, its product's and its own. Each of them has length 1,
    scaled by the root of its share, so mean cosines equal the shares: ``common`` for images of different categories,
    ``common + category`` in a category, ``1 - noise`` for two images of a product and one role. A query and a gallery
    image of a product have sqrt((1 - query noise) (1 - gallery noise)).

    Attributes:
        dim: Dimensions of the vectors.
        training: Number of training products, of 4 gallery images each.
        validation: Number of validation products, of 4 query and 2 gallery images each.
        test: Number of test products, of the same images.
        categories: Number of categories; products are divided among them at random.
        common: Share of the variance that all images have in common.
        category: Share that the products of a category have in common.
        gallery_noise: Share that differs between the gallery images of a product.
        query_noise: Share that differs between its queries.
        noise_spread: Standard deviation over products of the logarithm of their noise; its mean stays.
        head: Number of principal directions of equal variance.
        decay: Power with which the variance falls from one principal direction to the next after these.
        seed: Seed of the vectors.
    """

    dim: int = 256
    training: int = 20_000
    validation: int = 4000
    test: int = 400
    categories: int = 1000
    common: float = 0.25
    category: float = 0.2
    gallery_noise: float = 0.1
    query_noise: float = 0.33
    noise_spread: float = 0.3
    head: int = 4
    decay: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, dim=(1, 1 << 16), categories=(1, None), head=(1, None), seed=(0, None))
        if self.common + self.category + max(self.gallery_noise, self.query_noise) > 1:
            raise UserError("common: expected shares of at most 1 with category and noise. Reduce one of them.")


_DISTRACTORS = 3  # number of the products that are neither in training nor scored
_SPLITS = ("train", "validation", "test")
_ROLES = ("query",) * 4 + ("gallery",) * 2
_TRAINING_ROLES = ("gallery",) * 4
_BLOCK = 4096  # products drawn at once
_MOST_NOISE = 0.95


class SyntheticSource:
    """Products by number; equal configurations give equal vectors.

    ``distortion`` is the share of the variance that another model changes: two sources of the same products with
    different distortions are embeddings of the same images by two models.
    """

    def __init__(self, products: SyntheticProducts, distortion: float = 0.0) -> None:
        self._products, self._distortion = products, distortion
        rng = np.random.default_rng([products.seed, 0])
        ranks = np.maximum(np.arange(1, products.dim + 1), products.head)
        self._scale = (ranks ** (-products.decay / 2)).astype(np.float32)
        self._rotation = np.linalg.qr(rng.standard_normal((products.dim, products.dim)))[0].astype(np.float32)
        common = np.sqrt(products.common) * self._directions(rng, 1)
        self._centres = common + np.sqrt(products.category) * self._directions(rng, products.categories)

    def blocks(self, group: int, count: int, roles: tuple[str, ...]) -> Iterator[tuple[Vectors, Codes]]:
        """Yield L2-normalised vectors, (block * roles, dim) float32, and the (block,) categories of the products.

        ``group`` is the number of the split; the products of two groups are independent.
        """
        for block, start in enumerate(range(0, count, _BLOCK)):
            rng = np.random.default_rng([self._products.seed, 1 + group, block])
            vectors, categories = self._draw(rng, roles)
            used = min(_BLOCK, count - start)
            yield vectors[: used * len(roles)], categories[:used]

    def _draw(self, rng: np.random.Generator, roles: tuple[str, ...]) -> tuple[Vectors, Codes]:
        made = self._products
        categories = rng.integers(0, made.categories, _BLOCK)
        share = 1 - made.common - made.category - made.gallery_noise
        signal = self._centres[categories] + np.sqrt(max(share, 0)) * self._directions(rng, _BLOCK)
        spread = np.exp(made.noise_spread * rng.standard_normal(_BLOCK) - made.noise_spread**2 / 2)
        views, changes = rng.spawn(2)
        images = np.empty((_BLOCK, len(roles), made.dim), dtype=np.float32)
        for number, role in enumerate(roles):
            mean_noise = made.query_noise if role == "query" else made.gallery_noise
            noise = np.minimum(mean_noise * spread, _MOST_NOISE)[:, None].astype(np.float32)
            kept = np.sqrt((1 - noise) / (1 - made.gallery_noise))
            images[:, number] = kept * signal + np.sqrt(noise) * self._directions(views, _BLOCK)
            if self._distortion:
                images[:, number] *= np.sqrt(1 - self._distortion)
                images[:, number] += np.sqrt(self._distortion) * self._directions(changes, _BLOCK)
        return l2_normalize(images.reshape(-1, made.dim) @ self._rotation), categories

    def _directions(self, rng: np.random.Generator, count: int) -> Vectors:
        """Return (count, dim) float32 of length 1, with the spectrum along the axes."""
        drawn = rng.standard_normal((count, len(self._scale)), dtype=np.float32) * self._scale
        return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), dtype=np.float32)


def write_synthetic_embeddings(folder: Path, products: SyntheticProducts, distortion: float = 0.0) -> Path:
    """Write an embeddings artifact and its model, which holds no weights; see :class:`SyntheticSource`."""
    source = SyntheticSource(products, distortion)
    rows: list[dict[str, str]] = []
    parts: list[Vectors] = []
    for group, (split, count) in enumerate(
        zip(_SPLITS, (products.training, products.validation, products.test), strict=True)
    ):
        roles = _TRAINING_ROLES if split == "train" else _ROLES
        product = 0
        for vectors, categories in source.blocks(group, count, roles):
            parts.append(vectors)
            for category in categories.tolist():
                names = (f"{split}-{product}", str(category), split)
                rows += [_row(*names, view, role) for view, role in enumerate(roles)]
                product += 1
    name = f"synthetic-{distortion:g}"
    with write_artifact(folder / f"{name}-model", "student", {"distortion": distortion}) as draft:
        record_seen(draft.path, [])
        draft.embedding = Embedding(dim=products.dim, normalised=True, dtype="float32")
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), folder)
    model = load_artifact(folder / f"{name}-model")
    return write_embeddings(str(folder / name), np.concatenate(parts), catalog, model, {})


def write_synthetic_distractors(path: Path, products: SyntheticProducts, count: int) -> Path:
    """Write (count, dim) gallery images of other products, four of each, as a NumPy file."""
    roles = _TRAINING_ROLES
    vectors = np.empty((count, products.dim), dtype=np.float32)
    row = 0
    for block, _ in SyntheticSource(products).blocks(_DISTRACTORS, -(-count // len(roles)), roles):
        end = min(row + len(block), count)
        vectors[row:end] = block[: end - row]
        row = end
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_save_npy(path, vectors)
    return path


def _row(product: str, category: str, split: str, view: int, role: str) -> dict[str, str]:
    return {
        "image": f"{product}/{view}.jpg",
        "product": product,
        "category": category,
        "role": role,
        "split": split,
    }
