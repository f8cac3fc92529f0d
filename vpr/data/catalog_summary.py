"""Summary of a catalogue: a table of its splits, and counts of what deserves a look."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from vpr.data.catalog import Catalog, Rejected
from vpr.data.readers import SPLITS, UNLABELLED


def summary_lines(catalog: Catalog, rejected: list[Rejected], further: Iterable[str] = ()) -> list[str]:
    """Return the lines that describe a catalogue: a table of its splits, then counts, then further lines.

    Args:
        catalog: Catalogue with the split and role of every row.
        rejected: Images that were set aside, with the reason.
        further: Lines to append.
    """
    rows: list[tuple[str, ...]] = [("split", "products", "images", "queries", "gallery")]
    splits = catalog.table["split"].to_numpy()
    for split in SPLITS:
        inside = splits == split
        # Training ignores roles.
        roles = ["-", "-"] if split == "train" else [str(np.sum(inside & (catalog.roles == r))) for r in _ROLES]
        rows.append((split, str(len(np.unique(catalog.products[inside]))), str(np.sum(inside)), *roles))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    products, first, counts = np.unique(catalog.products, return_index=True, return_counts=True)
    lines.append(f"products with one image: {_by_split(Counter(splits[first[counts == 1]].tolist()))}")
    unlabelled = sum(product.startswith(f"{UNLABELLED}/") for product in products.tolist())
    lines.append(f"images without a label: {unlabelled}")
    lines.append(f"set aside: {_reasons(rejected)}")
    return [*lines, *further]


_ROLES = ("query", "gallery")
_MAX_REASONS = 4


def _by_split(counts: Counter[str]) -> str:
    parts = ", ".join(f"{counts[split]} {split}" for split in SPLITS if counts[split])
    return f"{counts.total()} ({parts})" if parts else "0"


def _reasons(rejected: list[Rejected]) -> str:
    """Return the number of images that were set aside, and the most frequent reasons; names in them are left out."""
    if not rejected:
        return "0"
    counts = Counter(reason.partition(": ")[0] for _, reason in rejected).most_common()
    parts = [f"{count} {reason}" for reason, count in counts[:_MAX_REASONS]]
    if len(counts) > _MAX_REASONS:
        parts.append(f"{sum(count for _, count in counts[_MAX_REASONS:])} for other reasons")
    return f"{len(rejected)} ({', '.join(parts)}; listed in set_aside.csv)"
