"""Choice of the queries and the gallery that models are scored on, from the roles of a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.readers import UNLABELLED
from vpr.retrieval.self_search import content_keys

log = get_logger(__name__)


@dataclass(frozen=True)
class ScoredPart:
    """Queries and gallery of a split.

    Attributes:
        catalog: Rows with the roles ``query`` and ``gallery``; when leaving one out, all queries come first.
        own: (queries,) gallery row of each query's own image, which is no result; None if the gallery has none.
        skipped: Number of queries that were left out because no other gallery image has their product.
    """

    catalog: Catalog
    own: NDArray[np.int64] | None = None
    skipped: int = 0

    def embed(self, embed: Callable[[Catalog], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return the (n, dim) vectors of the rows; an image that is query and gallery is embedded once."""
        if self.own is None:
            return embed(self.catalog)
        vectors = embed(self.catalog.select(role="gallery"))
        return np.concatenate([vectors[self.own], vectors])

    @property
    def notes(self) -> list[str]:
        """Sentences about the choice, for a row."""
        notes = [] if self.own is None else ["each query searches all other images of the split (leave-one-out)"]
        counted = f"{self.skipped} queries left out: no other gallery image has their product"
        return [*notes, *([counted] if self.skipped else [])]


def choose_queries(part: Catalog, leave_one_out: bool = False, skip_unmatched: bool = False) -> ScoredPart:
    """Return what is scored of a split.

    Where the queries and the gallery are the same images, each query searches the other images, as with
    ``leave_one_out``, for which roles do not matter.

    Args:
        part: Rows of the split.
        leave_one_out: Take every image as a query that searches all others; repeated rows of one content count once.
        skip_unmatched: Leave out queries of products without another gallery image, instead of an error.

    Raises:
        UserError: Images have no product, a role is missing, or a query cannot be answered.
    """
    _reject_unlabelled(part)
    if not leave_one_out and _has_equal_sets(part):
        log.info("the queries and the gallery are the same images: each query searches the others (leave-one-out)")
        leave_one_out = True
    if not leave_one_out:
        absent = {"query", "gallery"} - set(part.roles.tolist())
        if absent:
            fix = "Choose another --split, or score each image against the others with --leave-one-out"
            raise UserError(f"split: this split has no {sorted(absent)[0]} images. {fix}.")
        is_unmatched = (part.roles == "query") & ~np.isin(part.products, part.products[part.roles == "gallery"])
        _check_unmatched(part, is_unmatched, int((part.roles == "query").sum()), skip_unmatched)
        return ScoredPart(part.where(~is_unmatched), None, int(is_unmatched.sum()))
    images = _distinct(part)
    if not len(images):
        raise UserError("split: this split has no images. Choose another --split.")
    counts = Counter(images.products.tolist())
    is_unmatched = np.array([counts[product] == 1 for product in images.products.tolist()])
    _check_unmatched(images, is_unmatched, len(images), skip_unmatched)
    own = np.flatnonzero(~is_unmatched)
    tables = [_with_role(images.take(own), "query"), _with_role(images, "gallery")]
    joined = Catalog(pa.concat_tables(tables).combine_chunks(), part.root, part.artifact)
    return ScoredPart(joined, own, int(is_unmatched.sum()))


def _reject_unlabelled(part: Catalog) -> None:
    unlabelled = int(np.count_nonzero(part.table["source"].to_numpy() == UNLABELLED))
    if unlabelled:
        problem = f"{unlabelled} images have no product, so no result can be right or wrong"
        raise UserError(f"split: {problem}. Embed them, and use `vpr search` with --submission or --output.")


def _check_unmatched(part: Catalog, is_unmatched: NDArray[np.bool_], queries: int, skip: bool) -> None:
    """Raise :class:`UserError` if a query cannot be answered and may not be left out, or none is left."""
    count = int(is_unmatched.sum())
    if not count:
        return
    first = part.table["image"][int(np.flatnonzero(is_unmatched)[0])].as_py()
    problem = f"{count} of {queries} queries have no other gallery image of their product, first '{first}'"
    if not skip:
        raise UserError(f"split: {problem}. Add gallery images, or leave these queries out with --skip-unmatched.")
    if count == queries:
        raise UserError(f"split: {problem}. Add gallery images.")
    log.warning(f"{problem}: left out")


def _has_equal_sets(part: Catalog) -> bool:
    """Return whether the queries and the gallery are the same images."""
    queries, gallery = (set(content_keys(part.select(role=role))) for role in ("query", "gallery"))
    return bool(queries) and queries == gallery


def _distinct(part: Catalog) -> Catalog:
    """Return the first row of each content, so that no image finds itself under another name."""
    first: dict[tuple[str, str, str], int] = {}
    for row, key in enumerate(content_keys(part)):
        first.setdefault(key, row)
    if len(first) < len(part):
        log.info(f"{len(part) - len(first)} of {len(part)} rows repeat an image of the split and count once")
    return part.take(np.array(list(first.values()), dtype=np.int64))


def _with_role(part: Catalog, role: str) -> pa.Table:
    column = SCHEMA.get_field_index("role")
    return part.table.set_column(column, SCHEMA.field("role"), pa.array([role] * len(part), pa.string()))
