"""Splits whose queries are their gallery images: each image searches the others (leave-one-out)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog

log = get_logger(__name__)

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


@dataclass(frozen=True)
class SearchRows:
    """Rows of a catalogue's queries and of the gallery that they search.

    Attributes:
        queries: (queries,) rows of the images that search, ascending.
        gallery: (gallery,) rows of the images that are searched, ascending.
        own: (queries,) index in ``gallery`` of each query's own image, which is no result, or -1 where the gallery of
            its split are other images; None if that is so in all splits.
        skipped: Number of images that do not search, because no other image has their product.
    """

    queries: Rows
    gallery: Rows
    own: Rows | None
    skipped: int

    def keep(self, is_kept: NDArray[np.bool_]) -> SearchRows:
        """Return the same queries with the gallery images that ``is_kept``, (gallery,) bool, marks."""
        own = self.own
        if own is not None:
            own = np.where((own >= 0) & is_kept[own], np.cumsum(is_kept)[own] - 1, -1)
        return replace(self, gallery=self.gallery[is_kept], own=own)


def find_search_rows(rows: Catalog, searching: Collection[str], searched: Collection[str]) -> SearchRows:
    """Return the queries of the ``searching`` splits and the gallery of the ``searched`` ones, which include them.

    Where the queries and the gallery of a searching split are the same images, each searches the others.

    Raises:
        UserError: They are the same, and no product has two images.
    """
    splits = np.array([split or "" for split in rows.table["split"].to_pylist()], dtype=np.str_)
    queries, gallery, own = ([np.empty(0, np.int64)] for _ in range(3))
    skipped = 0
    for split in sorted(searched):
        part = np.flatnonzero(splits == split)
        roles, found = rows.roles[part], find_self_search(rows.take(part)) if split in searching else None
        if found is not None:
            queries.append(part[found.queries])
            own.append(part[found.queries])
            gallery.append(part[found.gallery])
            skipped += found.skipped
            continue
        gallery.append(part[roles == "gallery"])
        if split in searching:
            queries.append(part[roles == "query"])
            own.append(np.full(len(queries[-1]), -1))
    searches, images, rows_of_own = np.concatenate(queries), np.sort(np.concatenate(gallery)), np.concatenate(own)
    order = np.argsort(searches)
    is_own = rows_of_own[order] >= 0
    places = np.where(is_own, np.searchsorted(images, rows_of_own[order]), -1)
    return SearchRows(searches[order], images, places if is_own.any() else None, skipped)


def self_search_values(found: SearchRows) -> dict[str, str]:
    """Return what cards record of the queries: earlier versions let an image find itself where it is in both roles.

    It is empty where no query is in the gallery. The search is logged otherwise.
    """
    if found.own is None:
        return {}
    skipped = f", {found.skipped} are the only ones of their product and do not search" if found.skipped else ""
    log.info(f"the queries and the gallery are the same images: each searches the others (leave-one-out){skipped}")
    return {"queries_search": "leave-one-out"}


def find_own_images(part: Catalog) -> NDArray[np.bool_]:
    """Return which gallery images have the content and the product of a query, (queries, gallery) bool."""
    codes: dict[ContentKey, int] = {}
    rows = np.array([codes.setdefault(key, len(codes)) for key in content_keys(part)], dtype=np.int64)
    return rows[part.roles == "query", None] == rows[part.roles == "gallery"]


ContentKey = tuple[str, str, str]
_ROLES = ("query", "gallery")


def content_keys(part: Catalog) -> list[ContentKey]:
    """Return what identifies the content of each row: checksum or name of the image, box and product."""
    table = part.table
    checksums, names = (table[column].to_pylist() for column in ("sha256", "image"))
    contents = [sha256 or name for sha256, name in zip(checksums, names, strict=True)]
    return list(zip(contents, map(str, table["box"].to_pylist()), part.products.tolist(), strict=True))
