"""Which pictures ranges are measured on: a seeded, stratified draw from the training split."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vpr.catalog import Catalog
from vpr.errors import UserError


def select_pictures(catalog: Catalog, count: int, seed: int) -> NDArray[np.int64]:
    """Rows for calibration, products taking turns in a seeded order.

    Args:
        catalog: training pictures only.
        count: pictures wanted.
        seed: of the draw.

    Returns:
        (count,) int64 rows, sorted.

    Raises:
        UserError: too few pictures, or one that is not of the training split.
    """
    strangers = set(catalog.table["split"].to_pylist()) - {"train"}
    if strangers:
        raise UserError(
            f"calibration: pictures of the {sorted(strangers)[0]} split are scored later: give the train split"
        )
    if not 1 <= count <= len(catalog):
        raise UserError(f"count: {count} pictures wanted, the training split has {len(catalog)}: choose 1 to that many")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(catalog))
    products = catalog.products[order]
    # The n-th picture of every product comes before any product's (n+1)-th.
    turn = np.empty(len(order), dtype=np.int64)
    for product in np.unique(products):
        at = np.flatnonzero(products == product)
        turn[at] = np.arange(len(at))
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])
