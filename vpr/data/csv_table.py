"""CSV tables with limits for untrusted files, and errors that name the line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vpr.common.errors import UserError
from vpr.data.columns import rename_columns

SEPARATORS = (",", ";", "\t", "|")
_MAX_FIELD = 1 << 20
_MAX_ROW = 4 << 20  # characters, on any number of lines
MAX_COLUMNS = 1000


def read_csv_rows(
    table: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    may_be_empty: Sequence[str] = (),
    mapping: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV in UTF-8, with column names in its first line, after their line numbers.

    The separator is the comma, semicolon, tab or bar that divides the first line. ``required`` and ``optional`` columns
    are found by :func:`vpr.data.columns.rename_columns`, and have these names in the rows.

    Raises:
        UserError: A required column, or a value of one outside of ``may_be_empty``, is missing, a limit is exceeded, or
            the text is broken.
    """
    check_table_file(table)
    csv.field_size_limit(_MAX_FIELD)
    with table.open(newline="", encoding="utf-8-sig") as stream:
        lines = BoundedLines(stream)
        reader: csv.DictReader[str] | None = None
        try:
            separator = find_separator(lines.peek())
            reader = csv.DictReader(lines, strict=True, delimiter=separator)
            columns = list(reader.fieldnames or [])
            if len(columns) > MAX_COLUMNS:
                raise UserError(f"{table}: more than {MAX_COLUMNS} columns. Remove those that are not needed.")
            where = f"{table} (separated by '{separator}')".replace("\t", "tab")
            reader.fieldnames = rename_columns(columns, (*required, *optional), required, mapping or {}, where)
            filled = [name for name in required if name not in may_be_empty]
            for values in reader:
                if problem := _find_problem(values, required, filled):
                    raise UserError(f"{table}: line {reader.line_num}: {problem}")
                yield reader.line_num, {name: value or "" for name, value in values.items()}
                lines.row_characters = 0
        except (csv.Error, UnicodeDecodeError) as error:
            line = reader.line_num + 1 if reader else 1
            raise UserError(f"{table}: line {line}: {error}. Write it as CSV in UTF-8.") from None


def read_csv_header(table: Path) -> list[str]:
    """Return the names of a CSV's columns as its first line has them; empty if the line is broken."""
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        header = BoundedLines(stream).peek()
    try:
        return next(csv.reader([header], delimiter=find_separator(header)), [])
    except csv.Error:
        return []


def check_table_file(table: Path) -> None:
    """Raise :class:`UserError` unless the path is a file."""
    if table.is_dir():
        raise UserError(f"{table}: it is a folder. Give the path of the CSV file.")
    if not table.is_file():
        raise UserError(f"{table}: no such file. Check the path.")


def find_separator(header: str) -> str:
    """Return the separator that divides a header line into most columns; the comma if none does."""
    counts = {}
    for separator in SEPARATORS:
        try:
            counts[separator] = len(next(csv.reader([header], delimiter=separator), []))
        except csv.Error:
            counts[separator] = 0
    return max(SEPARATORS, key=lambda separator: counts[separator])  # the first of equal ones


def _find_problem(values: dict[Any, Any], required: Sequence[str], filled: Sequence[str]) -> str:
    """Return what is wrong with a row and how to fix it, or an empty string."""
    if empty := [name for name in filled if not values[name]]:
        return f"no value for '{empty[0]}'. Complete the row."
    if None in values:  # DictReader's key of surplus cells
        return "more cells than columns. Quote values with commas."
    if any("\0" in value for value in values.values() if value):  # NumPy drops zero bytes at the end of a text
        return "a zero byte. Write it as CSV in UTF-8."
    if broken := [name for name in required if "\n" in (values[name] or "") or "\r" in (values[name] or "")]:
        # A stray quote joins the lines below it to its row.
        return f"'{broken[0]}' has a line break. Look for a stray quote above."
    return ""


class BoundedLines:
    """Lines of a table that limit the length of a row, on any number of lines.

    ``row_characters`` counts the characters of the current row; the caller resets it after each row.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._peeked: str | None = None
        self.row_characters = 0

    def __iter__(self) -> BoundedLines:
        return self

    def __next__(self) -> str:
        line = self._read()
        self._peeked = None
        if not line:
            raise StopIteration
        self.row_characters += 0 if line.isspace() else len(line)
        if self.row_characters > _MAX_ROW:
            raise csv.Error(f"a row of more than {_MAX_ROW} characters")
        return line

    def peek(self) -> str:
        """Return the next line without taking it; empty at the end."""
        self._peeked = self._read()
        return self._peeked

    def _read(self) -> str:
        return self._stream.readline(_MAX_ROW + 1) if self._peeked is None else self._peeked
