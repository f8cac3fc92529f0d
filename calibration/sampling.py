"""Seeded selection of calibration images from the training split, by one of three rules."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from calibration.config import Selection
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.splits import check_leaks

# Candidates that k-centre embeds per selected image.
POOL = 8


def select_images(
    catalog: Catalog,
    count: int,
    seed: int,
    selection: Selection = "stratified",
    embed: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None = None,
    evaluation: Catalog | None = None,
) -> NDArray[np.int64]:
    """Select ``count`` rows of training images for calibration: int64, sorted.

    ``stratified`` takes products in turn, and ``random`` draws uniformly. ``k-centre`` selects from a larger stratified
    sample, so that every image of the sample is near a selected one; for it, ``embed`` maps rows to (rows, dim) float32
    vectors of unit length. :class:`UserError` if there are too few images, or if one is outside the training split or
    scored: in ``evaluation``.
    """
    if scored := sorted(set(catalog.table["split"].to_pylist()) - {"train"}):
        raise UserError(f"calibration: images of the {scored[0]} split are scored later. Use the train split.")
    if not 1 <= count <= len(catalog):
        raise UserError(f"count: expected 1 to {len(catalog)}, the size of the training split, got {count}.")
    rng = np.random.default_rng(seed)
    if selection == "random":
        rows = rng.permutation(len(catalog))[:count]
    elif selection == "stratified":
        rows = _order_by_turns(catalog, rng)[:count]
    else:
        if embed is None:
            raise ValueError("k-centre needs embeddings")
        pool = _order_by_turns(catalog, rng)[: POOL * count]
        rows = pool[k_centre(embed(pool), count)]
    rows = np.sort(rows)
    if evaluation is not None:
        check_leaks(catalog.take(rows), evaluation)
    return rows


def k_centre(vectors: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Select rows of (n, dim) greedily, the first near the mean, each farthest from those before (Gonzalez, 1985)."""
    mean = vectors.mean(axis=0)
    selected = [int(np.argmin(((vectors - mean) ** 2).sum(axis=1)))]
    distance = ((vectors - vectors[selected[0]]) ** 2).sum(axis=1)
    while len(selected) < count:
        distance[selected] = -1.0
        selected.append(int(np.argmax(distance)))
        distance = np.minimum(distance, ((vectors - vectors[selected[-1]]) ** 2).sum(axis=1))
    return np.array(selected, dtype=np.int64)


def _order_by_turns(catalog: Catalog, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return all rows in an order in which every product's n-th image comes before any (n+1)-th image."""
    order = rng.permutation(len(catalog))
    products = catalog.products[order]
    turn = np.empty(len(order), dtype=np.int64)
    for product in np.unique(products):
        positions = np.flatnonzero(products == product)
        turn[positions] = np.arange(len(positions))
    return order[np.argsort(turn, kind="stable")]
