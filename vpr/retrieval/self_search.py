"""Splits whose queries are their gallery images: each image searches the others (leave-one-out)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.data.catalog import Catalog

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class SelfSearch:
    """Rows of a split in which each image searches the others.

    Attributes:
        queries: (queries,) rows of the images that search.
        gallery: (gallery,) rows of the images that are searched, one row for each image.
        own: (queries,) index in ``gallery`` of each query's own image, which is no result.
        skipped: Number of images that do not search, because no other image has their product.
    """

    queries: Rows
    gallery: Rows
    own: Rows
    skipped: int


def find_self_search(part: Catalog) -> SelfSearch | None:
    """Return how the images of a split search each other; None if its queries and gallery are not the same images.

    Raises:
        UserError: They are the same, and no product has two images.
    """
    keys, roles = content_keys(part), part.roles.tolist()
    queries, gallery = ({key for key, own in zip(keys, roles, strict=True) if own == role} for role in _ROLES)
    if not queries or queries != gallery:
        return None
    first: dict[ContentKey, int] = {}
    for row, (key, role) in enumerate(zip(keys, roles, strict=True)):
        if role in _ROLES:
            first.setdefault(key, row)
    rows = np.array(list(first.values()), dtype=np.int64)
    _, inverse, counts = np.unique(part.products[rows], return_inverse=True, return_counts=True)
    own = np.flatnonzero(counts[inverse] > 1)
    if not len(own):
        problem = "its queries and gallery are the same images, and no product has two of them"
        raise UserError(f"split: {problem}. Add images of the products.")
    return SelfSearch(rows[own], rows, own, len(rows) - len(own))


ContentKey = tuple[str, str, str]
_ROLES = ("query", "gallery")


def content_keys(part: Catalog) -> list[ContentKey]:
    """Return what identifies the content of each row: checksum or name of the image, box and product."""
    table = part.table
    checksums, names = (table[column].to_pylist() for column in ("sha256", "image"))
    contents = [sha256 or name for sha256, name in zip(checksums, names, strict=True)]
    return list(zip(contents, map(str, table["box"].to_pylist()), part.products.tolist(), strict=True))
