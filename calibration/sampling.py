"""Which images ranges are measured on: a seeded draw from the training split, by one of three rules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from calibration.config import Selection
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.splits import check_leaks

# k-centre embeds at most so many images for each one it chooses.
POOL = 8


def select_images(
    catalog: Catalog,
    count: int,
    seed: int,
    selection: Selection = "stratified",
    embed: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None = None,
    evaluation: Catalog | None = None,
) -> NDArray[np.int64]:
    """Rows for calibration.

    Args:
        catalog: training images only.
        count: images wanted.
        seed: of the draw.
        selection: ``stratified`` lets products take turns, ``random`` draws evenly, ``k-centre`` takes the
            images that leave none of a larger stratified draw far from all chosen ones.
        embed: rows to (rows, dim) float32 vectors of unit length; for ``k-centre``.
        evaluation: images that are scored and must not be among those calibrated on.

    Returns:
        (count,) int64 rows, sorted.

    Raises:
        UserError: too few images, or one that is not of the training split or is scored.
    """
    strangers = set(catalog.table["split"].to_pylist()) - {"train"}
    if strangers:
        raise UserError(
            f"calibration: images of the {sorted(strangers)[0]} split are scored later: give the train split"
        )
    if not 1 <= count <= len(catalog):
        raise UserError(f"count: {count} images wanted, the training split has {len(catalog)}: choose 1 to that many")
    rng = np.random.default_rng(seed)
    if selection == "random":
        rows = rng.permutation(len(catalog))[:count]
    elif selection == "stratified":
        rows = _by_turns(catalog, rng)[:count]
    else:
        if embed is None:
            raise ValueError("k-centre needs embeddings")
        pool = _by_turns(catalog, rng)[: POOL * count]
        rows = pool[k_centre(embed(pool), count)]
    rows = np.sort(rows)
    if evaluation is not None:
        check_leaks(catalog.take(rows), evaluation)
    return rows


def k_centre(vectors: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Greedy k-centre: each choice is the vector farthest from all before it (Gonzalez, 1985).

    Args:
        vectors: (n, dim) float32.
        count: of vectors chosen, at most n.

    Returns:
        (count,) int64 rows in the order of choice; the first is nearest to the mean.
    """
    mean = vectors.mean(axis=0)
    chosen = [int(np.argmin(((vectors - mean) ** 2).sum(axis=1)))]
    distance = ((vectors - vectors[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < count:
        distance[chosen] = -1.0
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, ((vectors - vectors[chosen[-1]]) ** 2).sum(axis=1))
    return np.array(chosen, dtype=np.int64)


def _by_turns(catalog: Catalog, rng: np.random.Generator) -> NDArray[np.int64]:
    """All rows: the n-th image of every product comes before any product's (n+1)-th."""
    order = rng.permutation(len(catalog))
    products = catalog.products[order]
    turn = np.empty(len(order), dtype=np.int64)
    for product in np.unique(products):
        at = np.flatnonzero(products == product)
        turn[at] = np.arange(len(at))
    return order[np.argsort(turn, kind="stable")]
