"""Catalogue: a table of images with product, role and split, stored as an artifact."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpr.artifacts.card import Parent
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.artifacts.writer import ArtifactWriter
from vpr.common.errors import UserError
from vpr.data.location import FILE as LOCATION
from vpr.data.location import find_root, write_location
from vpr.data.readers import ROLES, SPLITS, Row
from vpr.imaging.decode import Box

Rejected = tuple[str, str]
SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("product", pa.string()),
        ("category", pa.string()),
        ("role", pa.string()),
        ("split", pa.string()),
        ("box", pa.struct([(side, pa.float32()) for side in "xywh"])),
        ("source", pa.string()),
        ("sha256", pa.string()),
    ]
)
_OUTSIDE_ROOT = r"^/|(^|/)\.\.(/|$)"


@dataclass(frozen=True)
class Catalog:
    """Table of images, and the folder that holds them.

    Attributes:
        table: Table of :data:`SCHEMA`.
        root: Folder that ``image`` is relative to.
        artifact: Artifact that the table was loaded from; selections keep the artifact of the full catalogue.
    """

    table: pa.Table
    root: Path
    artifact: Artifact | None = None

    def __len__(self) -> int:
        return self.table.num_rows

    def select(self, split: str | None = None, role: str | None = None) -> Catalog:
        """Select the rows of a split and a role; None selects all."""
        table = self.table
        for column, value in (("split", split), ("role", role)):
            if value is not None:
                table = table.filter(pc.equal(table[column], value))
        return replace(self, table=table.combine_chunks())

    def take(self, rows: NDArray[np.int64]) -> Catalog:
        """Select rows by index, in this order."""
        return replace(self, table=self.table.take(pa.array(rows)))

    def where(self, mask: NDArray[np.bool_]) -> Catalog:
        """Select rows by an (n,) bool mask."""
        return replace(self, table=self.table.filter(pa.array(mask)))

    def as_parents(self, role: str = "catalog") -> list[Parent]:
        """Return the catalogue's artifact as an entry of ``parents``; empty without an artifact."""
        return [self.artifact.as_parent(role)] if self.artifact else []

    @cached_property
    def products(self) -> NDArray[np.str_]:
        """Product ids, (n,)."""
        return self._column("product")

    @cached_property
    def categories(self) -> NDArray[np.str_]:
        """Categories, (n,); empty text if unknown."""
        return self._column("category")

    @cached_property
    def roles(self) -> NDArray[np.str_]:
        """Roles, (n,)."""
        return self._column("role")

    @cached_property
    def sha256(self) -> str:
        """Checksum of the rows, independent of their order."""
        columns = [self.table[name].to_pylist() for name in ("image", "product", "role", "split", "sha256")]
        if self.table["box"].null_count < len(self):
            columns.append([str(box) for box in self.table["box"].to_pylist()])
        rows = sorted(zip(*columns, strict=True))
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def path(self, row: int) -> Path:
        """Return the file of a row."""
        return self.root / self.table["image"][row].as_py()

    def box(self, row: int) -> Box | None:
        """Return the box (x, y, width, height) of a row in pixels, or None."""
        box = self.table["box"][row].as_py()
        return None if box is None else (box["x"], box["y"], box["w"], box["h"])

    def summary(self) -> dict[str, Any]:
        """Return the card's entry: sources, counts by split and role, checksum."""
        products = {split: self.table["product"].filter(pc.equal(self.table["split"], split)) for split in SPLITS}
        return {
            "sources": sorted(self.table["source"].unique().to_pylist()),
            "images": {split: len(rows) for split, rows in products.items()},
            "products": {split: len(rows.unique()) for split, rows in products.items()},
            "roles": {role["values"]: role["counts"] for role in self.table["role"].value_counts().to_pylist()},
            "sha256": self.sha256,
        }

    def _column(self, name: str) -> NDArray[np.str_]:
        values = np.array(self.table[name].to_pylist(), dtype=np.str_)
        values.flags.writeable = False  # the properties cache it
        return values


def write_catalog_files(draft: ArtifactWriter, catalog: Catalog, rejected: list[Rejected]) -> None:
    """Write a catalogue and its rejected images (``set_aside.csv``) to a draft artifact."""
    pq.write_table(catalog.table, draft.path / "catalog.parquet")
    with (draft.path / "set_aside.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "reason"])
        writer.writerows(rejected)
    if catalog.root != draft.path:  # the sample's images are in the catalogue
        draft.unlisted |= {LOCATION}
        write_location(draft.path, catalog.root, draft.name)
    draft.catalog = catalog.summary()
    draft.metrics = {"images": len(catalog), "set_aside": len(rejected)}


def load_catalog(path: Path | str) -> Catalog:
    """Load a catalogue artifact; raise :class:`UserError` for another kind or an invalid table."""
    artifact = load_artifact(path, "catalog")
    with reraise_as_artifact_error(artifact):
        table = pq.read_table(artifact.file("catalog.parquet")).cast(SCHEMA)
        table.validate(full=True)
        if pc.any(pc.match_substring_regex(table["image"], _OUTSIDE_ROOT)).as_py():
            raise UserError("the path of an image leads out of its root")
    config = artifact.card.config
    if config.get("reader") == "sample":
        return Catalog(table, artifact.path, artifact)
    if not isinstance(config.get("root"), str):
        raise UserError(f"{artifact.path}: its card does not say where the images are ('root'). Rerun `vpr catalog`.")
    recorded = (
        Path(str(config["image_root"]))
        if config.get("image_root")
        else image_root(config.get("reader"), config["root"])
    )
    with reraise_as_artifact_error(artifact):
        return Catalog(table, find_root(artifact.path, recorded, table), artifact)


def rows_to_table(rows: list[Row]) -> pa.Table:
    """Convert rows to a table, in which a row that its source puts in no split has an empty one.

    :func:`vpr.data.division.split_by_product` gives every row a split.

    Raises:
        UserError: A role or split is unknown.
    """
    for column, known in (("role", ROLES), ("split", SPLITS)):
        unknown = sorted({str(row[column]) for row in rows} - {*known, *([""] if column == "split" else [])})
        if unknown:
            raise UserError(f"catalogue: {column} '{unknown[0]}' is not known. Use {', '.join(known)}.")
    return pa.table({name: [row[name] for row in rows] for name in SCHEMA.names}, schema=SCHEMA)


def image_root(reader: str | None, root: str) -> Path:
    """Return the folder that a reader's ``image`` column is relative to."""
    return Path(root).parent if reader == "csv" else Path(root)
