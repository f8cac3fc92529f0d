"""The catalogue: one table of pictures with product, role and split, and what keeps evaluation honest."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpr.artifact import Artifact, Draft, Parent, find_current, load_artifact, plain, write_artifact
from vpr.console import say
from vpr.errors import UserError
from vpr.images import Box, ImageRefused, decode_bytes, read_picture
from vpr.readers import READERS, Row

Refused = tuple[str, str]
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
_CHECK_SIZE = 64  # pixels; JPEGs are read to their end at a reduced scale


@dataclass(frozen=True)
class CatalogConfig:
    """Where pictures come from and how products are split.

    Attributes:
        reader: form of the data; ``sample`` is embedded and needs no root.
        output: where the catalogue is written.
        root: folder of the data set, or the CSV file.
        validation: share of products held out to choose checkpoints; with ``test`` 0 too, the reader's splits stay.
        test: share of products held out to be scored.
        seed: of the split.
        skip_unreadable: set unreadable pictures aside in ``set_aside.csv`` instead of refusing.
    """

    reader: Literal["sample", "products10k", "aicrowd", "csv", "folder"]
    output: str
    root: str = ""
    validation: float = 0.0
    test: float = 0.0
    seed: int = 0
    skip_unreadable: bool = False


@dataclass(frozen=True)
class Catalog:
    """Rows of pictures.

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
        keep = np.ones(len(self), dtype=bool)
        for column, value in (("split", split), ("role", role)):
            if value is not None:
                keep &= self._column(column) == value
        return Catalog(self.table.filter(pa.array(keep)), self.root, self.artifact)

    @property
    def products(self) -> NDArray[np.str_]:
        """(n,) product ids."""
        return self._column("product")

    @property
    def categories(self) -> NDArray[np.str_]:
        """(n,) categories, empty where there is none."""
        return self._column("category")

    @property
    def roles(self) -> NDArray[np.str_]:
        """(n,) roles."""
        return self._column("role")

    @property
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
        splits = self._column("split")
        return {
            "sources": sorted(set(self.table["source"].to_pylist())),
            "pictures": {split: int((splits == split).sum()) for split in SPLITS},
            "products": {split: len(set(self.products[splits == split].tolist())) for split in SPLITS},
            "roles": dict(Counter(self.roles.tolist())),
            "sha256": self.sha256,
        }

    def _column(self, name: str) -> NDArray[np.str_]:
        return np.array(self.table[name].to_pylist(), dtype=np.str_)


def build_catalog(config: CatalogConfig) -> Path:
    """Read, check and split pictures, and write them as an artifact of kind ``catalog``.

    Every picture is decoded once. The sample's pictures lie in the artifact, others stay where they are.

    Raises:
        UserError: no pictures, a broken table, or (without ``skip_unreadable``) a picture that cannot be read.
    """
    values = plain(config)
    if config.reader == "sample":
        return _build_sample(config, values)
    if not config.root:
        raise UserError(f"root: empty: give the folder or CSV file that the {config.reader} reader reads")
    values["root"] = str(Path(config.root).resolve())
    rows = list(READERS[config.reader](Path(config.root)))
    if not rows:
        raise UserError(f"{config.root}: no pictures here: check --root and --reader")
    root = _root(config.reader, config.root)
    good, refused = check_pictures(root, rows, config.skip_unreadable)
    if not good:
        raise UserError(f"{config.root}: none of its {len(rows)} pictures can be read: check --root")
    catalog = Catalog(split_by_product(table_of(good), config.validation, config.test, config.seed), root)
    old = find_current(config.output, "catalog", values, [])
    if old and old.card.metrics["set_aside"] == len(refused) and load_catalog(old.path).table.equals(catalog.table):
        say(f"{config.output}: up to date")
        return Path(config.output)
    with write_artifact(config.output, "catalog", values) as draft:
        _fill(draft, catalog, refused)
    _say_built(config, catalog, refused)
    return Path(config.output)


def _build_sample(config: CatalogConfig, values: dict[str, Any]) -> Path:
    """The embedded sample, its pictures unpacked into the artifact."""
    from vpr.sample import unpack

    if find_current(config.output, "catalog", values, []):
        say(f"{config.output}: up to date")
        return Path(config.output)
    with write_artifact(config.output, "catalog", values) as draft:
        draft.unlisted = frozenset({"images"})
        rows, _ = check_pictures(draft.path, list(unpack(draft.path)), skip_unreadable=False)
        catalog = Catalog(split_by_product(table_of(rows), config.validation, config.test, config.seed), draft.path)
        _fill(draft, catalog, [])
    _say_built(config, catalog, [])
    return Path(config.output)


def _fill(draft: Draft, catalog: Catalog, refused: list[Refused]) -> None:
    pq.write_table(catalog.table, draft.path / "catalog.parquet")
    with (draft.path / "set_aside.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "reason"])
        writer.writerows(refused)
    draft.catalog = catalog.summary()
    draft.metrics = {"pictures": len(catalog), "set_aside": len(refused)}


def _say_built(config: CatalogConfig, catalog: Catalog, refused: list[Refused]) -> None:
    where = " (listed in set_aside.csv)" if refused else ""
    products = len(set(catalog.products.tolist()))
    say(f"{config.output}: {len(catalog)} pictures of {products} products, {len(refused)} set aside{where}")


def write_catalog(path: Path | str, catalog: Catalog, parents: list[Parent] | None = None) -> Path:
    """Write a catalogue that was merged or selected, so that stages can be given it; the pictures stay in its root.

    Args:
        path: of the artifact.
        catalog: what to write.
        parents: the catalogues that it was made from.
    """
    with write_artifact(path, "catalog", {"reader": "table", "root": str(catalog.root.resolve())}, parents) as draft:
        _fill(draft, catalog, [])
    return Path(path)


def load_catalog(path: Path | str) -> Catalog:
    """Load a catalogue artifact.

    Raises:
        UserError: not a catalogue, or a table of another form.
    """
    artifact = load_artifact(path, "catalog")
    try:
        table = pq.read_table(artifact.file("catalog.parquet")).cast(SCHEMA)
    except (pa.ArrowInvalid, ValueError, KeyError) as error:
        raise UserError(f"{artifact.path}: catalog.parquet is not a catalogue ({error}): build it again") from None
    config = artifact.card.config
    if config.get("reader") == "sample":
        return Catalog(table, artifact.path, artifact)
    if not isinstance(config.get("root"), str):
        raise UserError(f"{artifact.path}: its card does not say where the pictures are ('root'): build it again")
    return Catalog(table, _root(config.get("reader"), config["root"]), artifact)


def table_of(rows: list[Row]) -> pa.Table:
    """Rows as a table; refuses a role or split that is not known."""
    for column, known in (("role", ROLES), ("split", SPLITS)):
        strange = {row[column] for row in rows} - set(known)
        if strange:
            raise UserError(f"catalogue: {column} '{sorted(strange)[0]}' is not known: use {', '.join(known)}")
    return pa.table({name: [row[name] for row in rows] for name in SCHEMA.names}, schema=SCHEMA)


def check_pictures(root: Path, rows: list[Row], skip_unreadable: bool) -> tuple[list[Row], list[Refused]]:
    """Decode every picture once and add its ``sha256``.

    Args:
        root: folder that ``image`` is relative to.
        rows: of a reader.
        skip_unreadable: collect refusals instead of raising the first.

    Returns:
        the readable rows, and (image, reason) of the others.
    """
    good: list[Row] = []
    refused: list[Refused] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for row, outcome in zip(rows, pool.map(lambda row: _check(root, row), rows), strict=True):
            if isinstance(outcome, str):
                good.append({**row, "sha256": outcome})
            elif skip_unreadable:
                refused.append((row["image"], outcome.reason))
            else:
                pool.shutdown(cancel_futures=True)
                raise outcome
    return good, refused


def split_by_product(table: pa.Table, validation: float, test: float, seed: int) -> pa.Table:
    """Assign whole products to splits.

    Held-out products whose pictures have no retrieval role get one: the first half (rounded up) of a
    product's pictures, by path, is its gallery, the rest are queries. Products with a single
    picture cannot be queried and stay in training.

    Args:
        table: of :data:`SCHEMA`.
        validation: share of products.
        test: share of products.
        seed: the same products and seed give the same split, whatever the order of the rows.

    Raises:
        UserError: shares that leave no training products, or a share that comes to no product.
    """
    if validation == 0 and test == 0:
        return table
    if min(validation, test) < 0 or validation + test >= 1:
        raise UserError(f"validation {validation} and test {test}: shares of products, together less than 1")
    rows = table.to_pylist()
    pictures: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["product"], row["image"], str(row["box"]))):
        pictures.setdefault(row["product"], []).append(row)
    names = np.array([name for name, group in pictures.items() if len(group) > 1], dtype=np.str_)
    np.random.default_rng(seed).shuffle(names)
    tests, validations = round(test * len(pictures)), round(validation * len(pictures))
    held = dict.fromkeys(names[:tests].tolist(), "test")
    held.update(dict.fromkeys(names[tests : tests + validations].tolist(), "validation"))
    for name, share in (("validation", validation), ("test", test)):
        if share and name not in held.values():
            raise UserError(
                f"{name} {share}: is none of {len(pictures)} products, {len(names)} of which have the two pictures "
                "that a query and its gallery need: raise it or add pictures"
            )
    for name, group in pictures.items():
        for number, row in enumerate(group):
            row["split"] = held.get(name, "train")
            if name in held and row["role"] == "train":
                row["role"] = "gallery" if 2 * number < len(group) else "query"
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def check_leaks(train: Catalog, evaluation: Catalog) -> None:
    """Refuse training pictures or products that are also evaluated.

    Raises:
        UserError: with the number and the first few of the shared ones.
    """
    for column, what in (("product", "products"), ("sha256", "pictures (same bytes)")):
        shared = sorted(set(train.table[column].to_pylist()) & set(evaluation.table[column].to_pylist()))
        if not shared:
            continue
        if column == "sha256":
            at = pc.index_in(pa.array(shared[:3]), train.table["sha256"].combine_chunks()).to_pylist()
            first = [train.table["image"][row].as_py() for row in at]
        else:
            first = shared[:3]
        raise UserError(
            f"leak: {len(shared)} {what} are both trained and scored, first {', '.join(first)}: split again"
        )


def _root(reader: str | None, root: str) -> Path:
    return Path(root).parent if reader == "csv" else Path(root)


def _check(root: Path, row: Row) -> str | ImageRefused:
    path, box = root / row["image"], row["box"]
    try:
        data = read_picture(path)
        decode_bytes(data, path, None if box is None else tuple(box.values()), _CHECK_SIZE)
    except ImageRefused as refused:
        return refused
    return hashlib.sha256(data).hexdigest()
