"""Parquet tables with limits for untrusted files.

A small file may hold many copies of a long text, as an entry of a dictionary, by shared prefixes or compressed. So the
text that is decoded is bounded by the size of the file, and checked before it becomes Python text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.data.csv_table import MAX_COLUMNS

MAX_CELL = 1 << 20  # characters; checked here as bytes of UTF-8, of which a character has up to four
_MAX_CELL_BYTES = 4 * MAX_CELL
_BATCH_ROWS = 1024
_BATCH_BYTES = 1 << 24  # of text that is decoded at a time
# Bytes of text, and of a decompressed row group, that a file may hold: some, and so many for each of its bytes. Paths
# below each other compress 20-fold, and columns of few distinct values take no space.
_FREE_BYTES, _MAX_EXPANSION = 1 << 25, 200
_FREE_PADDED, _MAX_PADDING = 1 << 27, 32  # the same for texts as an array, for each byte of the text
_FREE_ROWS = 1 << 20  # and one for each byte of the file, since every row names another image
_DELTAS = "DELTA_"  # encodings that Arrow does not read as a dictionary; one of them repeats prefixes


def read_parquet_columns(table: Path) -> list[str]:
    """Return the columns of a Parquet file; raise :class:`UserError` if it is broken or has too many."""
    with _parquet_errors(table), pq.ParquetFile(table) as file:
        if len(file.schema_arrow.names) > MAX_COLUMNS:
            raise UserError(f"{table}: more than {MAX_COLUMNS} columns. Remove those that are not needed.")
        return list(file.schema_arrow.names)


def read_parquet_rows(table: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the values of some columns after the number of their row, from 1.

    Raises:
        UserError: The file is broken, a column is neither text, a number, a date nor a list of numbers, or a limit of
            this module is exceeded.
    """
    number = 0
    for batch, count in _read_batches(table, columns):
        step = 1 if count > _BATCH_BYTES else max(1, len(batch))
        for start in range(0, len(batch), step):
            for values in _to_rows(table, batch.slice(start, step)):
                number += 1
                yield number, values


def read_text_columns(table: Path, columns: list[str]) -> list[NDArray[np.str_]]:
    """Return columns of text, each as (rows,) array.

    Raises:
        UserError: The file is broken, a column is not text or misses a value, or a limit of this module is exceeded.
            NumPy stores each text with the length of the longest one, which is limited too.
    """
    values: dict[str, list[str]] = {name: [] for name in columns}
    text = 0
    for batch, count in _read_batches(table, columns):
        text += count
        for name in columns:
            cells = batch.column(name)
            is_text = _is_text(table, batch.schema.field(name))
            if not is_text or cells.null_count:
                raise UserError(f"{table}: column '{name}' is not text in every row. Write the file again.")
            values[name] += cells.to_pylist()
    padded = sum(4 * len(texts) * max(map(len, texts), default=0) for texts in values.values())
    if padded > _FREE_PADDED + _MAX_PADDING * text:
        raise _too_large(table, f"with the length of the longest one, its texts have {padded} bytes")
    return [np.array(texts, dtype=np.str_) for texts in values.values()]


def _read_batches(table: Path, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield batches of some columns, and their bytes of text, within the limits of this module."""
    size = table.stat().st_size
    max_bytes, max_rows = _FREE_BYTES + _MAX_EXPANSION * size, _FREE_ROWS + size
    with _parquet_errors(table), pq.ParquetFile(table) as file:
        if file.metadata.num_rows > max_rows:
            raise _too_large(table, f"it has {file.metadata.num_rows} rows")
        texts = [name for name in columns if _is_text(table, file.schema_arrow.field(name))]
        dictionaries, batch_rows = _plan(table, file.metadata, columns, texts, max_bytes)
    number, total = 0, 0
    with _parquet_errors(table), pq.ParquetFile(table, read_dictionary=dictionaries) as file:
        for batch in file.iter_batches(batch_rows, columns=columns):
            sizes = _text_bytes(table, batch, texts, number)
            count = int(sizes.sum())
            total += count
            number += len(batch)
            if total > max_bytes or number > max_rows:  # the file's metadata may be wrong
                raise _too_large(table, f"{number} rows have {total} bytes of text")
            yield batch, count


def _plan(
    table: Path, metadata: pq.FileMetaData, columns: Sequence[str], texts: Sequence[str], max_bytes: int
) -> tuple[list[str], int]:
    """Check the sizes of row groups; return the text columns to read as dictionaries, and the rows of a batch.

    A dictionary is decoded once, however many rows repeat its entries.
    """
    largest, deltas = MAX_CELL, set()
    for group in range(metadata.num_row_groups):
        chunks = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
        read = [(chunk, _column_of(chunk.path_in_schema, columns)) for chunk in chunks]
        # The numbers of a list repeat too, and a batch has all those of its rows.
        sizes = {
            name: max(chunk.total_uncompressed_size, 8 * chunk.num_values * (chunk.path_in_schema != name))
            for chunk, name in read
            if name
        }
        if sum(sizes.values()) > max_bytes:
            raise _too_large(table, f"row group {group} has {sum(sizes.values())} bytes")
        found = {name for chunk, name in read if name and any(str(e).startswith(_DELTAS) for e in chunk.encodings)}
        deltas |= found
        largest = max([largest, *(sizes[name] for name in found)])
    names = [name for name in texts if name not in deltas]
    # The rows of a batch are as long as their column chunk at most, unless they repeat an entry of a dictionary.
    return names, _BATCH_ROWS if len(names) == len(texts) else max(1, min(_BATCH_ROWS, 4 * _BATCH_BYTES // largest))


def _to_rows(table: Path, batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the values of each row; dictionaries are decoded first, since Arrow converts their entries slowly.

    Raises:
        UserError: A date or time has no value in Python, such as one after the year 9999 or with nanoseconds.
    """
    arrays = [cells.dictionary_decode() if isinstance(cells, pa.DictionaryArray) else cells for cells in batch.columns]
    names, columns = batch.schema.names, []
    for name, cells in zip(names, arrays, strict=True):
        try:
            columns.append(cells.to_pylist())
        except (OverflowError, ValueError) as error:  # ValueError for nanoseconds and unknown time zones
            problem = f"column '{name}' of type {cells.type} has a value that cannot be read ({error})"
            raise UserError(f"{table}: {problem}. Write it as text.") from None
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _column_of(path: str, columns: Sequence[str]) -> str:
    """Return the column of a path in the file's schema, or an empty text if it is not read."""
    return next((name for name in columns if path == name or path.startswith(f"{name}.")), "")


def _is_text(table: Path, field: pa.Field) -> bool:
    """Return whether a column is text; raise :class:`UserError` for a type that no value of a table has."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return True
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = pa.null() if pa.types.is_fixed_size_list(kind) and kind.list_size > MAX_COLUMNS else kind.value_type
        is_known = pa.types.is_floating(kind) or pa.types.is_integer(kind)
    else:
        is_known = not (pa.types.is_nested(kind) or _is_binary(kind))
    if not is_known:
        fix = "Write it as text, and a box as a list of numbers"
        raise UserError(f"{table}: column '{field.name}' has the type {field.type}. {fix}.")
    return False


def _is_binary(kind: pa.DataType) -> bool:
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def _text_bytes(table: Path, batch: pa.RecordBatch, texts: Sequence[str], number: int) -> NDArray[np.int64]:
    """Return the (rows,) bytes of text in each row; raise :class:`UserError` for a too long cell.

    Args:
        table: Table, for the error.
        batch: Rows.
        texts: Columns with text.
        number: Number of the row before the batch.
    """
    sizes = np.zeros(len(batch), np.int64)
    for name in texts:
        cells = batch.column(name)
        if isinstance(cells, pa.DictionaryArray):
            lengths = pc.binary_length(cells.dictionary).take(cells.indices)
        else:
            lengths = pc.binary_length(cells)
        column = lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        if len(column) and column.max() > _MAX_CELL_BYTES:
            where = f"{table}: row {number + 1 + int(column.argmax())}"
            raise UserError(f"{where}: '{name}' has more than {MAX_CELL} characters. Write the row again.")
        sizes += column
    return sizes


def _too_large(table: Path, problem: str) -> UserError:
    return UserError(f"{table}: {problem}, too many for a file of {table.stat().st_size} bytes. Write it as CSV.")


@contextmanager
def _parquet_errors(table: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{table}: broken Parquet ({error}). Write the file again.") from None
