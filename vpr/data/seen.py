"""Products and images that a model has seen, as hashes in a file of its artifact, and their counts in what is scored.

The file holds no names: a hash shows whether a known product was seen, and not which products there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.readers import UNLABELLED

FILE = "seen.parquet"
Use = Literal["training", "distillation", "calibration", "selection"]
USES: tuple[Use, ...] = ("training", "distillation", "calibration", "selection")
LEARNED: tuple[Use, ...] = ("training", "distillation", "calibration")  # uses that make recall untrue

_SALT = "visual-product-recognition"
_KINDS = ("product", "image")
_SCHEMA = pa.schema([("kind", pa.string()), ("hash", pa.uint64()), *((use, pa.bool_()) for use in USES)])
_UNKNOWN = b"unknown"  # key of the file's metadata
_MAX_BYTES, _MAX_ROWS, _MAX_UNKNOWN = 1 << 28, 1 << 24, 1 << 16


@dataclass(frozen=True)
class Hashes:
    """Sorted hashes without repetition, (n,) uint64, and their uses, (n,) uint8 with a bit for each of :data:`USES`."""

    values: NDArray[np.uint64]
    uses: NDArray[np.uint8]

    def count(self, scored: NDArray[np.uint64]) -> dict[Use, int]:
        """Return how many of the distinct ``scored`` hashes have each use."""
        uses = self.uses[np.isin(self.values, scored)]
        return {use: int(np.count_nonzero(uses & (1 << bit))) for bit, use in enumerate(USES)}


@dataclass(frozen=True)
class Seen:
    """Products and images that a model, and all models it comes from, have seen.

    Attributes:
        products: Hashes of product ids.
        images: Hashes of checksums of image files.
        unknown: Names of models it comes from that have no record; the hashes are then incomplete.
    """

    products: Hashes
    images: Hashes
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """Hashes of the products and images that are scored, (n,) uint64 each, without repetition."""

    products: NDArray[np.uint64]
    images: NDArray[np.uint64]


def describe_unrecorded(unknown: Sequence[str]) -> str:
    """Return the mark of a model that comes from models without a record; empty if there are none."""
    return f"seen products unknown: {', '.join(unknown)} has no record of them" if unknown else ""


@dataclass(frozen=True)
class SeenCounts:
    """Counts of scored products and images that a model has seen.

    Attributes:
        products: Number of scored products.
        images: Number of scored images of different content.
        seen_products: Number of them that the model has seen, by use.
        seen_images: Number of images that the model has seen, by use.
        unknown: Names of models without a record, so that more may have been seen.
    """

    products: int
    images: int
    seen_products: dict[Use, int]
    seen_images: dict[Use, int]
    unknown: tuple[str, ...]

    @property
    def learned(self) -> str:
        """Mark of a model that has learned or calibrated on what is scored; empty if there is nothing to mark."""
        parts = list(filter(None, map(self._part, LEARNED)))
        return f"seen: {', '.join(parts)}" if parts else ""

    @property
    def selected(self) -> str:
        """Mark of a model whose epoch, weights or layers were chosen on what is scored; empty if they were not."""
        part = self._part("selection")
        return f"selected on: {part.removesuffix(' in selection')}" if part else ""

    @property
    def unrecorded(self) -> str:
        """Mark of a model that is not known to have seen nothing; empty if all is recorded."""
        return describe_unrecorded(self.unknown)

    def _part(self, use: Use) -> str:
        """Return a use's products, or its images if they have other products; empty if it has neither."""
        if count := self.seen_products[use]:
            return f"{count} of {self.products} products in {use}"
        count = self.seen_images[use]
        return f"{count} of {self.images} images in {use}" if count else ""


def seen_in(catalog: Catalog, use: Use) -> Seen:
    """Return the products and images of a catalogue as seen for a use; images without labels have no product."""
    scored, bit = hash_catalog(catalog), np.uint8(1 << USES.index(use))
    products, images = (Hashes(values, np.full(len(values), bit)) for values in (scored.products, scored.images))
    return Seen(products, images)


def hash_catalog(catalog: Catalog) -> Scored:
    """Return the hashes of a catalogue's products and images."""
    is_labelled = catalog.table["source"].to_numpy() != UNLABELLED
    products = catalog.where(is_labelled).table["product"].unique().to_pylist()
    images = catalog.table["sha256"].drop_null().unique().to_pylist()
    return Scored(_hash("product", products), _hash("image", images))


def hash_products(products: Iterable[str]) -> Scored:
    """Return the hashes of products whose images are not known."""
    return Scored(_hash("product", sorted(set(products))), np.empty(0, np.uint64))


def combine(records: Iterable[Seen]) -> Seen:
    """Return all that several records have seen."""
    records = list(records)
    unknown = tuple(dict.fromkeys(name for record in records for name in record.unknown))
    return Seen(_merge([record.products for record in records]), _merge([record.images for record in records]), unknown)


def record_seen(folder: Path, parents: Iterable[Artifact | Seen], uses: Mapping[Use, Catalog] | None = None) -> None:
    """Write the record of an artifact: what its parents have seen, and the catalogues by use.

    Long work reads the records of the parents before it starts, so that a broken one is found then.
    """
    inherited = [parent if isinstance(parent, Seen) else read_seen(parent) for parent in parents]
    own = [seen_in(catalog, use) for use, catalog in (uses or {}).items()]
    write_seen(folder, combine([*inherited, *own]))


def write_seen(folder: Path, seen: Seen) -> None:
    """Write a record into the folder of an artifact."""
    tables = []
    for kind, hashes in zip(_KINDS, (seen.products, seen.images), strict=True):
        flags: dict[str, Any] = {str(use): (hashes.uses & (1 << bit)) > 0 for bit, use in enumerate(USES)}
        columns: dict[str, Any] = {"kind": [kind] * len(hashes.values), "hash": hashes.values, **flags}
        tables.append(pa.table(columns, schema=_SCHEMA))
    metadata = {_UNKNOWN: json.dumps(seen.unknown).encode()}
    table = pa.concat_tables(tables).replace_schema_metadata(metadata)
    # Sorted hashes are random bytes: a dictionary would only repeat them.
    pq.write_table(table, folder / FILE, use_dictionary=["kind"], compression="zstd")


def read_seen(artifact: Artifact) -> Seen:
    """Return the record of an artifact; one without the file, made by an earlier version, is unknown.

    Raises:
        UserError: The record is too large or broken.
    """
    if FILE not in artifact.card.files:
        return Seen(_merge([]), _merge([]), (artifact.card.name,))
    path = artifact.file(FILE)
    with reraise_as_artifact_error(artifact):
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{FILE} has more than {_MAX_BYTES} bytes")
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > _MAX_ROWS:
                raise UserError(f"{FILE} has more than {_MAX_ROWS} rows")
            if not file.schema_arrow.remove_metadata().equals(_SCHEMA):
                raise UserError(f"{FILE} has other columns than {', '.join(_SCHEMA.names)}")
            unknown = _parse_unknown((file.schema_arrow.metadata or {}).get(_UNKNOWN, b"[]"))
            table = file.read()
        table.validate(full=True)
        kinds = table["kind"].to_numpy()
        bits = [table[use].to_numpy().astype(np.uint8) << bit for bit, use in enumerate(USES)]
        uses, values = np.bitwise_or.reduce(bits), table["hash"].to_numpy()
        products, images = (_merge([Hashes(values[kinds == kind], uses[kinds == kind])]) for kind in _KINDS)
    return Seen(products, images, unknown)


def count_seen(seen: Seen, scored: Scored) -> SeenCounts:
    """Count the scored products and images that a model has seen."""
    products, images = seen.products.count(scored.products), seen.images.count(scored.images)
    return SeenCounts(len(scored.products), len(scored.images), products, images, seen.unknown)


def _hash(kind: str, values: Sequence[str]) -> NDArray[np.uint64]:
    """Return the sorted first 8 bytes of the salted SHA-256 of each text, (n,) uint64 without repetition."""
    start = hashlib.sha256(f"{_SALT}/{kind}/".encode())
    digests = bytearray()
    for value in values:
        state = start.copy()
        state.update(value.encode("utf-8", "surrogatepass"))
        digests += state.digest()[:8]
    return np.unique(np.frombuffer(bytes(digests), dtype=">u8").astype(np.uint64))


def _merge(parts: Sequence[Hashes]) -> Hashes:
    """Return the union; a hash in several parts has the uses of all."""
    values = np.concatenate([np.empty(0, np.uint64), *(part.values for part in parts)])
    uses = np.concatenate([np.empty(0, np.uint8), *(part.uses for part in parts)])
    distinct, inverse = np.unique(values, return_inverse=True)
    merged = np.zeros(len(distinct), np.uint8)
    np.bitwise_or.at(merged, inverse, uses)
    return Hashes(distinct, merged)


def _parse_unknown(raw: bytes) -> tuple[str, ...]:
    names: Any = json.loads(raw) if len(raw) <= _MAX_UNKNOWN else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{FILE}: its metadata '{_UNKNOWN.decode()}' is not a short list of names")
    return tuple(names)
