"""CSV tables with limits for untrusted files, and errors that name the line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from vpr.common.errors import UserError

_MAX_FIELD = 1 << 20
_MAX_ROW = 4 << 20  # characters, on any number of lines
_MAX_COLUMNS = 1000
_MAX_SHOWN = 200  # characters of the header in an error message


def read_csv_rows(table: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV in UTF-8, with column names in its first line, after their line numbers.

    Raises:
        UserError: A required column or value is missing, a limit is exceeded, or the text is broken.
    """
    if table.is_dir():
        raise UserError(f"{table}: it is a folder. Give the path of the CSV file.")
    if not table.is_file():
        raise UserError(f"{table}: no such file. Check the path.")
    csv.field_size_limit(_MAX_FIELD)
    with table.open(newline="", encoding="utf-8-sig") as stream:
        lines = BoundedLines(stream)
        reader = csv.DictReader(lines, strict=True)
        try:
            columns = reader.fieldnames or []
            if len(columns) > _MAX_COLUMNS:
                raise UserError(f"{table}: more than {_MAX_COLUMNS} columns. Remove those that are not needed.")
            if missing := [name for name in required if name not in columns]:
                found, needed = _shorten(columns), ", ".join(required)
                raise UserError(f"{table}: column '{missing[0]}' is missing. Found: {found}. Needed: {needed}.")
            for values in reader:
                if problem := _find_problem(values, required):
                    raise UserError(f"{table}: line {reader.line_num}: {problem}")
                yield reader.line_num, values
                lines.row_characters = 0
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{table}: line {reader.line_num + 1}: {error}. Write it as CSV in UTF-8.") from None


def _shorten(columns: Sequence[str]) -> str:
    text = ", ".join(columns) or "an empty first line"
    return f"{text[:_MAX_SHOWN]} ..." if len(text) > _MAX_SHOWN else text


def _find_problem(values: dict[str, str], required: tuple[str, ...]) -> str:
    """Return what is wrong with a row and how to fix it, or an empty string."""
    if empty := [name for name in required if not values[name]]:
        return f"no value for '{empty[0]}'. Complete the row."
    if None in values:  # DictReader's key of surplus cells
        return "more cells than columns. Quote values with commas."
    if any("\0" in value for value in values.values() if value):  # NumPy drops zero bytes at the end of a text
        return "a zero byte. Write it as CSV in UTF-8."
    if broken := [name for name in required if "\n" in values[name] or "\r" in values[name]]:
        # A stray quote joins the lines below it to its row.
        return f"'{broken[0]}' has a line break. Look for a stray quote above."
    return ""


class BoundedLines:
    """Lines of a CSV that limit the length of a row, on any number of lines.

    ``row_characters`` counts the characters of the current row; the caller resets it after each row.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.row_characters = 0

    def __iter__(self) -> BoundedLines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(_MAX_ROW + 1)
        if not line:
            raise StopIteration
        self.row_characters += 0 if line.isspace() else len(line)
        if self.row_characters > _MAX_ROW:
            raise csv.Error(f"a row of more than {_MAX_ROW} characters")
        return line
