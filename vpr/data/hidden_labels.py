"""Tables of a hidden test set, whose products are not published: images to embed and submit, not to score."""

import csv
from pathlib import Path

from vpr.common.log import get_logger

log = get_logger(__name__)

_MAX_HEADER = 1 << 16  # characters


def has_hidden_labels(tables: list[Path], column: str) -> bool:
    """Return whether none of the tables has the column of the product; log it, as recall cannot be measured then."""
    hidden = all(_lacks(table, column) for table in tables)
    if hidden:
        names = " and ".join(table.name for table in tables)
        log.info(f"{names} have no column '{column}': a hidden test set, to embed and submit with `vpr search`")
    return hidden


def _lacks(table: Path, column: str) -> bool:
    """Return whether a readable table lacks a column; the reader reports tables that are not."""
    if not table.is_file():
        return False
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        try:
            header = next(csv.reader([stream.readline(_MAX_HEADER)]), [])
        except csv.Error:
            return False
    return "img_path" in header and column not in header
