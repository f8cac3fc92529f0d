"""The catalogue: one table of images with product, role and split, and the artifact that keeps it."""

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

from vpr.artifacts.store import Artifact, ArtifactWriter, Parent, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.data.readers import Row
from vpr.imaging.decode import Box

Rejected = tuple[str, str]
ROLES = ("train", "gallery", "query")
SPLITS = ("train", "validation", "test")
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
_LEADS_OUT = r"^/|(^|/)\.\.(/|$)"


@dataclass(frozen=True)
class Catalog:
    """Rows of images.

    Attributes:
        table: of :data:`SCHEMA`.
        root: folder that ``image`` is relative to.
        artifact: where it was loaded from; the whole catalogue's, also for a selection.
    """

    table: pa.Table
    root: Path
    artifact: Artifact | None = None

    def __len__(self) -> int:
        return self.table.num_rows

    def select(self, split: str | None = None, role: str | None = None) -> Catalog:
        """The rows of a split and of a role; None takes all."""
        table = self.table
        for column, value in (("split", split), ("role", role)):
            if value is not None:
                table = table.filter(pc.equal(table[column], value))
        return replace(self, table=table.combine_chunks())

    def take(self, rows: NDArray[np.int64]) -> Catalog:
        """Some of the rows, in this order."""
        return replace(self, table=self.table.take(pa.array(rows)))

    def where(self, wanted: NDArray[np.bool_]) -> Catalog:
        """The rows for which (n,) bool says so."""
        return replace(self, table=self.table.filter(pa.array(wanted)))

    def as_parents(self, role: str = "catalog") -> list[Parent]:
        """Its artifact as an entry of another's ``parents``; none where it is of no artifact."""
        return [self.artifact.as_parent(role)] if self.artifact else []

    @cached_property
    def products(self) -> NDArray[np.str_]:
        """(n,) product ids."""
        return self._column("product")

    @cached_property
    def categories(self) -> NDArray[np.str_]:
        """(n,) categories, empty where there is none."""
        return self._column("category")

    @cached_property
    def roles(self) -> NDArray[np.str_]:
        """(n,) roles."""
        return self._column("role")

    @cached_property
    def sha256(self) -> str:
        """Checksum of what the rows say, whatever order or file they came from."""
        columns = [self.table[name].to_pylist() for name in ("image", "product", "role", "split", "sha256")]
        if self.table["box"].null_count < len(self):
            columns.append([str(box) for box in self.table["box"].to_pylist()])
        lines = sorted(zip(*columns, strict=True))
        return hashlib.sha256(repr(lines).encode()).hexdigest()

    def path(self, row: int) -> Path:
        """File of a row."""
        return self.root / self.table["image"][row].as_py()

    def box(self, row: int) -> Box | None:
        """Box of a row in pixels, (x, y, width, height)."""
        box = self.table["box"][row].as_py()
        return None if box is None else (box["x"], box["y"], box["w"], box["h"])

    def summary(self) -> dict[str, Any]:
        """What a card says of it: sources, counts by split and role, checksum."""
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
        values.flags.writeable = False  # it is kept
        return values


def write_catalog_files(draft: ArtifactWriter, catalog: Catalog, refused: list[Rejected]) -> None:
    """Put a catalogue and the list of what was set aside into an artifact that is being written."""
    pq.write_table(catalog.table, draft.path / "catalog.parquet")
    with (draft.path / "set_aside.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "reason"])
        writer.writerows(refused)
    draft.catalog = catalog.summary()
    draft.metrics = {"images": len(catalog), "set_aside": len(refused)}


def load_catalog(path: Path | str) -> Catalog:
    """Load a catalogue artifact.

    Raises:
        UserError: not a catalogue, or a table of another form.
    """
    artifact = load_artifact(path, "catalog")
    with reraise_as_artifact_error(artifact):
        table = pq.read_table(artifact.file("catalog.parquet")).cast(SCHEMA)
        table.validate(full=True)
        if pc.any(pc.match_substring_regex(table["image"], _LEADS_OUT)).as_py():
            raise UserError("an image's path leads out of its root")
    config = artifact.card.config
    if config.get("reader") == "sample":
        return Catalog(table, artifact.path, artifact)
    if not isinstance(config.get("root"), str):
        raise UserError(f"{artifact.path}: its card does not say where the images are ('root'): build it again")
    return Catalog(table, image_root(config.get("reader"), config["root"]), artifact)


def rows_to_table(rows: list[Row]) -> pa.Table:
    """Rows as a table; refuses a role or split that is not known."""
    for column, known in (("role", ROLES), ("split", SPLITS)):
        strange = {str(row[column]) for row in rows} - set(known)
        if strange:
            raise UserError(f"catalogue: {column} '{sorted(strange)[0]}' is not known: use {', '.join(known)}")
    return pa.table({name: [row[name] for row in rows] for name in SCHEMA.names}, schema=SCHEMA)


def image_root(reader: str | None, root: str) -> Path:
    """The folder that a reader's ``image`` column is relative to."""
    return Path(root).parent if reader == "csv" else Path(root)
