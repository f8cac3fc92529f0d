"""Tables of images: CSV, JSON lines and Parquet, read row by row with limits for untrusted files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpr.common.errors import UserError
from vpr.data.boxes import BOX_COLUMNS
from vpr.data.columns import common_names, rename_columns
from vpr.data.csv_table import MAX_COLUMNS, BoundedLines, check_table_file, read_csv_header, read_csv_rows
from vpr.data.parquet_table import MAX_CELL, read_parquet_columns, read_parquet_rows

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
_SHOWN_COLUMNS = 8
_BOX_KEYS = ("bbox", "bounding_box", "boxes", "box_x", "bbox_x", "xmin", "x_min", "x1")
_SPLIT_NAMES = ("subset", "set", "partition", "fold", "usage", "phase", "dataset", "is_test", "is_train", "train_test")

Record = tuple[int, dict[str, Any]]


def read_table_rows(
    table: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    may_be_empty: Sequence[str] = (),
    mapping: Mapping[str, str] | None = None,
) -> Iterator[Record]:
    """Yield the rows of a table after their numbers; the suffix says whether it is CSV, JSON lines or Parquet.

    Values are text, a missing one is empty, and a list of numbers stays a list. Columns are found as for
    :func:`vpr.data.csv_table.read_csv_rows`. Numbers are lines, or rows of a Parquet file from 1.

    Raises:
        UserError: A column or value is missing, or the table is broken.
    """
    suffix = table.suffix.lower()
    if suffix not in (*JSON_LINES, *PARQUET):
        yield from read_csv_rows(table, required, optional, may_be_empty, mapping)
        return
    check_table_file(table)
    is_parquet = suffix in PARQUET
    found = list_columns(table)
    where = f"{table} ({'Parquet' if is_parquet else 'JSON lines'})"
    known = (*required, *optional)
    names = dict(zip(found, rename_columns(found, known, required, mapping or {}, where), strict=True))
    used = {column: name for column, name in names.items() if name in known}
    filled = [name for name in required if name not in may_be_empty]
    records = read_parquet_rows(table, list(used)) if is_parquet else _read_json_lines(table)
    for number, values in records:
        where = f"{table}: {'row' if is_parquet else 'line'} {number}"
        row = {name: _to_cell(values.get(column), name, where) for column, name in used.items()}
        if empty := [name for name in filled if not row[name]]:
            raise UserError(f"{where}: no value for '{empty[0]}'. Complete the row.")
        yield number, row


def describe_unread(table: Path, read: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
    """Return lines about the columns of a table that are not read; one of them may hold its splits.

    Args:
        table: Table that was read.
        read: Names of the columns that were read.
        mapping: Columns that the user named.
    """
    found = list_columns(table)
    names = rename_columns(found, read, (), mapping, str(table))
    unread = [column for column, name in zip(found, names, strict=True) if name not in read and column.strip()]
    if not unread:
        return []
    notes = [f"columns that are not read: {_list_names(unread)}"]
    likely = [column for column in unread if column.strip().casefold() in _SPLIT_NAMES]
    if likely and "split" not in names:
        notes.append(f"column '{likely[0]}' may hold splits, which are not used: add --columns split={likely[0]}")
    return notes


def describe_unread_keys(keys: Sequence[str], missing: Sequence[str]) -> list[str]:
    """Return lines about the keys of shard labels that are not read; one of them may hold what all labels lack.

    Args:
        keys: Keys that are not read.
        missing: Those of ``product``, ``split`` and ``box`` that no label has.
    """
    if not keys:
        return []
    notes = [f"keys of labels that are not read: {_list_names(keys)}"]
    others = {"product": common_names("product"), "split": _SPLIT_NAMES, "box": _BOX_KEYS}
    for name in missing:
        if likely := [key for key in keys if key.casefold() in others[name]]:
            plural = "boxes" if name == "box" else f"{name}s"
            notes.append(f"key '{likely[0]}' may hold {plural}, which are not used: rename it to '{name}'")
    return notes


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
    return ", ".join(names[:_SHOWN_COLUMNS]) + more


def list_columns(table: Path) -> list[str]:
    """Return the names of a table's columns; those of JSON lines are the keys of all objects, in their first order."""
    check_table_file(table)
    if table.suffix.lower() in PARQUET:
        return read_parquet_columns(table)
    if table.suffix.lower() not in JSON_LINES:
        return read_csv_header(table)
    found: dict[str, None] = {}
    for number, values in _read_json_lines(table):
        found |= dict.fromkeys(values)
        if len(found) > MAX_COLUMNS:
            raise UserError(f"{table}: line {number}: more than {MAX_COLUMNS} different keys. Remove those not needed.")
    return list(found)


def _read_json_lines(table: Path) -> Iterator[Record]:
    """Yield the objects of a JSON-lines file after their line numbers."""
    number = 0
    with table.open(encoding="utf-8-sig") as stream:
        lines = BoundedLines(stream)
        try:
            for number, line in enumerate(lines, 1):
                lines.row_characters = 0
                if line.isspace():
                    continue
                values = json.loads(line, object_pairs_hook=to_object)
                if not isinstance(values, dict) or len(values) > MAX_COLUMNS:
                    raise ValueError(f"it is not an object of at most {MAX_COLUMNS} keys")
                yield number, values
        except (ValueError, RecursionError, csv.Error) as error:
            number += isinstance(error, UnicodeError | csv.Error)  # the line after the last one that was read
            raise UserError(f"{table}: line {number}: {error}. Write one JSON object per line in UTF-8.") from None


def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise :class:`ValueError` for a repeated key, of which one value would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:100]!r} is there twice")
    return values


def _to_cell(value: Any, column: str, where: str) -> Any:
    """Return a value as the text that a CSV would hold, or the list of numbers of a box; empty for none."""
    if value is None:
        return ""
    if column in BOX_COLUMNS and isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, list | tuple | dict | bytes):
        kind = {dict: "an object", bytes: "bytes"}.get(type(value), "a list")
        raise UserError(f"{where}: '{column}' is {kind}. Write it as text.")
    text = str(value)
    if "\0" in text or len(text) > MAX_CELL or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: a value that is not text of at most {MAX_CELL} characters. Write the row again.")
    return text
