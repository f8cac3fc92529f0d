"""A gallery of any size: real embeddings, and synthetic ones around them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.retrieval.embeddings import Embeddings, l2_normalize
from vpr.retrieval.search import search

_BLOCK = 1 << 16  # synthetic vectors per block


@dataclass(frozen=True)
class Gallery:
    """A gallery and the queries that search their products in it."""

    vectors: NDArray[np.float32]  # (n, dim) float32, L2-normalised
    products: NDArray[np.int32]  # (n,) int32, number of the product
    queries: NDArray[np.float32]  # (q, dim) float32, L2-normalised
    query_products: NDArray[np.int32]  # (q,) int32, number of each query's product


def build_real_gallery(embeddings: Embeddings, max_queries: int, seed: int) -> Gallery:
    """Return random queries and the artifact's other images as gallery; :class:`UserError` if either is missing."""
    query = embeddings.roles == "query"
    if not query.any() or query.all():
        raise UserError(f"{embeddings.artifact.path}: expected query and other images. Embed a catalogue with splits.")
    codes = np.unique(embeddings.products, return_inverse=True)[1].astype(np.int32)
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(query))[:max_queries]
    return Gallery(embeddings.vectors[~query], codes[~query], embeddings.vectors[drawn], codes[drawn])


def grow_gallery(real: Gallery, size: int, seed: int) -> Gallery:
    """Append synthetic vectors up to a size. A smaller gallery is a prefix of a larger one.

    A synthetic vector is a real vector plus or minus the offset of another real vector to its nearest neighbour, scaled
    by 0.5 to 1.5. It keeps the product of its real vector. So distances and directions are those of real images.
    :class:`UserError` if the size is below that of the real gallery.
    """
    count = len(real.vectors)
    if size < count:
        raise UserError(f"sizes: expected {count} or more, the size of the real gallery, got {size}. Change --sizes.")
    offsets = real.vectors[search(real.vectors, real.vectors, 2)[1][:, 1]] - real.vectors
    vectors = np.empty((size, real.vectors.shape[1]), dtype=np.float32)
    products = np.empty(size, dtype=np.int32)
    vectors[:count], products[:count] = real.vectors, real.products
    for block, start in enumerate(range(count, size, _BLOCK)):
        rng = np.random.default_rng([seed, block])
        sources, moved = rng.integers(0, count, (2, _BLOCK))
        scales = rng.uniform(0.5, 1.5, (_BLOCK, 1)) * rng.choice([-1, 1], (_BLOCK, 1))
        stop = min(start + _BLOCK, size)
        used = slice(0, stop - start)
        synthetic = real.vectors[sources[used]] + scales[used].astype(np.float32) * offsets[moved[used]]
        vectors[start:stop], products[start:stop] = l2_normalize(synthetic), real.products[sources[used]]
    return Gallery(vectors, products, real.queries, real.query_products)
