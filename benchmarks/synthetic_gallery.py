"""A gallery of any size: real embeddings, and synthetic ones around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.retrieval.embeddings import Embeddings, l2_normalize
from vpr.retrieval.search import search

_BLOCK = 1 << 16  # synthetic vectors made at a time


@dataclass(frozen=True)
class Gallery:
    """A gallery and the queries that look for their products in it.

    Attributes:
        vectors: (n, dim) float32, L2-normalised.
        products: (n,) int32, number of the product.
        queries: (q, dim) float32, L2-normalised.
        asked: (q,) int32, number of each query's product.
    """

    vectors: NDArray[np.float32]
    products: NDArray[np.int32]
    queries: NDArray[np.float32]
    asked: NDArray[np.int32]


def real_gallery(embeddings: Embeddings, most: int, seed: int) -> Gallery:
    """``most`` queries drawn from the artifact's, and all that are no queries as gallery.

    Raises:
        UserError: no queries, or nothing else.
    """
    query = embeddings.roles == "query"
    if not query.any() or query.all():
        raise UserError(f"{embeddings.artifact.path}: needs query images and others: embed a split catalogue")
    codes = np.unique(embeddings.products, return_inverse=True)[1].astype(np.int32)
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(query))[:most]
    return Gallery(embeddings.vectors[~query], codes[~query], embeddings.vectors[drawn], codes[drawn])


def grow(real: Gallery, size: int, seed: int) -> Gallery:
    """The gallery with synthetic vectors behind its own, ``size`` in all; a smaller one is the beginning of a larger.

    A synthetic vector is a real one, whose product it keeps, moved as another image is away from its nearest
    neighbour: either way, and half as far to half as far again. So its distance to its source, and the directions
    in which the gallery is filled, are those that real images have.

    Args:
        real: n vectors.
        size: n or more.
        seed: of the draws.

    Raises:
        UserError: a size below n.
    """
    count = len(real.vectors)
    if size < count:
        raise UserError(f"sizes: {size}: the real gallery has {count} vectors: give more")
    offsets = real.vectors[search(real.vectors, real.vectors, 2)[1][:, 1]] - real.vectors
    vectors = np.empty((size, real.vectors.shape[1]), dtype=np.float32)
    products = np.empty(size, dtype=np.int32)
    vectors[:count], products[:count] = real.vectors, real.products
    for block, start in enumerate(range(count, size, _BLOCK)):
        rng = np.random.default_rng([seed, block])
        source, moved = rng.integers(0, count, (2, _BLOCK))
        far = rng.uniform(0.5, 1.5, (_BLOCK, 1)) * rng.choice([-1, 1], (_BLOCK, 1))
        stop = min(start + _BLOCK, size)
        some = slice(0, stop - start)
        made = real.vectors[source[some]] + far[some].astype(np.float32) * offsets[moved[some]]
        vectors[start:stop], products[start:stop] = l2_normalize(made), real.products[source[some]]
    return Gallery(vectors, products, real.queries, real.asked)
