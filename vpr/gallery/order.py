"""Orders in which a migration embeds the images of a gallery with the new model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

OrderName = Literal["random", "spread", "error"]
ORDERS: tuple[OrderName, ...] = get_args(OrderName)
Rows = NDArray[np.int64]


def order_rows(
    name: OrderName, products: Sequence[str], images: Sequence[str], lengths: NDArray[np.float32], seed: int = 0
) -> Rows:
    """Return the (n,) rows in the order in which they are embedded; equal ids give equal orders in every gallery.

    ``random`` draws it. ``error`` begins with the largest expected error of the adapter. ``spread`` embeds one image of
    each product, then a second one, and so on, each time the one with the largest expected error.

    Args:
        name: Name of the order.
        products: (n,) product ids.
        images: (n,) image ids.
        lengths: (n,) float32 of :meth:`vpr.retrieval.adapter.Adapter.lengths`; short is a large expected error.
        seed: Seed of ``random``, and of the order of equals.
    """
    drawn = np.array([_draw(seed, *key) for key in zip(products, images, strict=True)], dtype=np.uint64)
    if name == "random":
        return np.argsort(drawn, kind="stable")
    if name == "error":
        return np.lexsort((drawn, lengths))
    return np.lexsort((drawn, lengths, _places(products, lengths, drawn)))


def _places(products: Sequence[str], lengths: NDArray[np.float32], drawn: NDArray[np.uint64]) -> Rows:
    """Return the (n,) place of each image among those of its product, 0 for the largest expected error."""
    _, codes, counts = np.unique(np.array(products, dtype=np.str_), return_inverse=True, return_counts=True)
    by_product = np.lexsort((drawn, lengths, codes))
    places = np.empty(len(products), dtype=np.int64)
    places[by_product] = np.arange(len(products)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def _draw(seed: int, product: str, image: str) -> int:
    content = f"{seed}:{len(product)}:{product}{image}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
