"""Metadata of gallery images: typed columns, read from a table by product or by image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vpr.common.errors import UserError
from vpr.data.columns import list_columns as name_columns
from vpr.data.tables import list_columns, read_table_rows

Key = tuple[str, str]
_TYPES = {"text": pa.string(), "number": pa.float64()}


@dataclass(frozen=True)
class Metadata:
    """Values of the metadata columns by (product, image); the image is empty for all images of a product.

    Attributes:
        columns: Types of the columns by name.
        values: Values in the order of the columns; None for a missing one.
    """

    columns: Mapping[str, str]
    values: Mapping[Key, tuple[str | float | None, ...]]

    def find(self, product: str, image: str) -> tuple[str | float | None, ...] | None:
        """Return the values of an image, or those of its product; None if the table has neither."""
        found = self.values.get((product, image))
        return self.values.get((product, "")) if found is None else found

    def count_known(self, products: Sequence[str], images: Sequence[str], path: str, owner: Path) -> int:
        """Return the number of images with values.

        Args:
            products: Product ids of images.
            images: Image ids.
            path: Table that was read, for the error.
            owner: Artifact with the images, for the error.

        Raises:
            UserError: The table has rows, and none is of these images.
        """
        known = sum(self.find(*key) is not None for key in zip(products, images, strict=True))
        if self.values and products and not known:
            problem = f"no row is of a product in {owner}"
            first = next(iter(self.values))
            example = f"It has {_name((products[0], images[0] if first[1] else ''))}, the table {_name(first)}"
            raise UserError(f"metadata: {path}: {problem}. {example}. Use the product ids of the catalogue.")
        return known

    def arrays(self, products: Sequence[str], images: Sequence[str]) -> dict[str, pa.Array]:
        """Return an array of each column for images; values that the table lacks are null."""
        empty = (None,) * len(self.columns)
        rows = [self.find(*key) or empty for key in zip(products, images, strict=True)]
        fields = metadata_fields(self.columns)
        return {field.name: pa.array([row[i] for row in rows], field.type) for i, field in enumerate(fields)}


def metadata_fields(columns: Mapping[str, str]) -> list[pa.Field]:
    """Return the fields of metadata columns."""
    return [pa.field(name, _TYPES[kind]) for name, kind in columns.items()]


def read_metadata(path: str, columns: Mapping[str, str]) -> Metadata:
    """Read a table with ``product``, optionally ``image``, and all metadata columns; an empty path has no rows.

    Raises:
        UserError: A column is missing, a number is not finite, or a row is there twice.
    """
    if not path:
        return Metadata(columns, {})
    table = Path(path)
    found = list_columns(table)
    if missing := [name for name in columns if name not in {" ".join(column.split()).casefold() for column in found}]:
        problem = f"column '{missing[0]}' is missing. Found: {name_columns(found)}"
        raise UserError(f"metadata: {path}: {problem}. Add the gallery's columns: {', '.join(columns)}.")
    if not columns:
        raise UserError("metadata: the gallery has no metadata columns. Create it with --columns.")
    values: dict[Key, tuple[str | float | None, ...]] = {}
    for number, row in read_table_rows(table, ["product"], ["image", *columns]):
        key = (row["product"], row.get("image") or "")
        if key in values:
            raise UserError(f"metadata: {path}: line {number}: {_name(key)} is there twice. Keep one row.")
        cells = ((row.get(name) or "", kind, name) for name, kind in columns.items())
        values[key] = tuple(_read_cell(*cell, f"{path}: line {number}") for cell in cells)
    return Metadata(columns, values)


def _read_cell(text: Any, kind: str, name: str, where: str) -> str | float | None:
    if not text:
        return None
    if kind == "text":
        return str(text)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"metadata: {where}: '{name}' is '{str(text)[:50]}', expected a number. Correct the row.")
    return value


def _name(key: Key) -> str:
    return f"image '{key[1]}' of product '{key[0]}'" if key[1] else f"product '{key[0]}'"
