"""Tables of images: CSV, JSON lines and Parquet, read row by row with limits for untrusted files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vpr.common.errors import UserError
from vpr.data.columns import rename_columns
from vpr.data.csv_table import MAX_COLUMNS, BoundedLines, check_table_file, read_csv_rows

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
_BATCH_ROWS = 1024
_MAX_CELL = 1 << 20  # characters

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
    found = _parquet_columns(table) if is_parquet else list(next(_read_json_lines(table), (0, {}))[1])
    where = f"{table} ({'Parquet' if is_parquet else 'JSON lines'})"
    known = (*required, *optional)
    names = dict(zip(found, rename_columns(found, known, required, mapping or {}, where), strict=True))
    used = {column: name for column, name in names.items() if name in known}
    filled = [name for name in required if name not in may_be_empty]
    records = _read_parquet(table, list(used)) if is_parquet else _read_json_lines(table)
    for number, values in records:
        where = f"{table}: {'row' if is_parquet else 'line'} {number}"
        row = {name: _to_cell(values.get(column), where) for column, name in used.items()}
        if empty := [name for name in filled if not row[name]]:
            raise UserError(f"{where}: no value for '{empty[0]}'. Complete the row.")
        yield number, row


def _read_json_lines(table: Path) -> Iterator[Record]:
    """Yield the objects of a JSON-lines file; the first one names the columns."""
    number = 0
    with table.open(encoding="utf-8-sig") as stream:
        lines = BoundedLines(stream)
        try:
            for number, line in enumerate(lines, 1):
                lines.row_characters = 0
                if line.isspace():
                    continue
                values = json.loads(line)
                if not isinstance(values, dict) or len(values) > MAX_COLUMNS:
                    raise ValueError(f"it is not an object of at most {MAX_COLUMNS} keys")
                yield number, values
        except (ValueError, RecursionError, csv.Error) as error:
            number += isinstance(error, UnicodeError | csv.Error)  # the line after the last one that was read
            raise UserError(f"{table}: line {number}: {error}. Write one JSON object per line in UTF-8.") from None


def _parquet_columns(table: Path) -> list[str]:
    """Return the columns of a Parquet file, after checks of its size."""
    with _parquet_errors(table), pq.ParquetFile(table) as file:
        if len(file.schema_arrow.names) > MAX_COLUMNS:
            raise UserError(f"{table}: more than {MAX_COLUMNS} columns. Remove those that are not needed.")
        return list(file.schema_arrow.names)


def _read_parquet(table: Path, columns: list[str]) -> Iterator[Record]:
    number = 0
    with _parquet_errors(table), pq.ParquetFile(table) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            for values in batch.to_pylist():
                number += 1
                yield number, values


@contextmanager
def _parquet_errors(table: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{table}: broken Parquet ({error}). Write the file again.") from None


def _to_cell(value: Any, where: str) -> Any:
    """Return a value as the text that a CSV would hold, or a list of numbers; empty for other objects."""
    if isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value):
        return list(value)
    if value is None or isinstance(value, list | tuple | dict | bytes):
        return ""
    text = str(value)
    if "\0" in text or len(text) > _MAX_CELL or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: a value that is not text of at most {_MAX_CELL} characters. Write the row again.")
    return text
