"""The catalogue: one table of pictures with product, role and split, and what keeps evaluation honest."""

from __future__ import annotations

import csv
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpr.artifact import Artifact, Draft, find_current, load_artifact, plain, reading, write_artifact
from vpr.console import say
from vpr.environment import available_cpus
from vpr.errors import UserError
from vpr.images import Box, ImageRefused, decode_bytes, read_picture
from vpr.readers import READERS, Row, unknown_suffixes

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
_LEADS_OUT = r"^/|(^|/)\.\.(/|$)"
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
        skip_unreadable: set unreadable pictures aside in ``set_aside.csv`` instead of refusing. The folder,
            pictures and webdataset readers always list there what is no picture by name.
    """

    reader: Literal["sample", "products10k", "aicrowd", "csv", "folder", "pictures", "webdataset"]
    output: str
    root: str = ""
    validation: float = 0.0
    test: float = 0.0
    seed: int = 0
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        check_shares(self.validation, self.test, self.seed)


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
        table = self.table
        for column, value in (("split", split), ("role", role)):
            if value is not None:
                table = table.filter(pc.equal(table[column], value))
        return Catalog(table.combine_chunks(), self.root, self.artifact)

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
            "pictures": {split: len(rows) for split, rows in products.items()},
            "products": {split: len(rows.unique()) for split, rows in products.items()},
            "roles": {role["values"]: role["counts"] for role in self.table["role"].value_counts().to_pylist()},
            "sha256": self.sha256,
        }

    def _column(self, name: str) -> NDArray[np.str_]:
        values = np.array(self.table[name].to_pylist(), dtype=np.str_)
        values.flags.writeable = False  # it is kept
        return values


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
    root = picture_root(config.reader, config.root)
    good, refused = check_pictures(root, rows, config.skip_unreadable)
    if config.reader in ("folder", "pictures"):
        refused += [(name, "unknown suffix") for name in unknown_suffixes(root, Path(config.output))]
    if not good:
        raise UserError(f"{config.root}: none of its {len(rows)} pictures can be read: check --root")
    catalog = Catalog(split_by_product(table_of(good), config.validation, config.test, config.seed), root)
    old = find_current(config.output, "catalog", values, [])
    if old and old.card.metrics["set_aside"] == len(refused) and load_catalog(old.path).table.equals(catalog.table):
        say(f"{config.output}: up to date")
        return Path(config.output)
    with write_artifact(config.output, "catalog", values) as draft:
        fill_draft(draft, catalog, refused)
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
        fill_draft(draft, catalog, [])
    _say_built(config, catalog, [])
    return Path(config.output)


def fill_draft(draft: Draft, catalog: Catalog, refused: list[Refused]) -> None:
    """Put a catalogue and the list of what was set aside into an artifact that is being written."""
    pq.write_table(catalog.table, draft.path / "catalog.parquet")
    with (draft.path / "set_aside.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "reason"])
        writer.writerows(refused)
    draft.catalog = catalog.summary()
    draft.metrics = {"pictures": len(catalog), "set_aside": len(refused)}


def _say_built(config: CatalogConfig, catalog: Catalog, refused: list[Refused]) -> None:
    where = " (listed in set_aside.csv)" if refused else ""
    products = len(set(catalog.products.tolist()))
    say(f"{config.output}: {len(catalog)} pictures of {products} products, {len(refused)} set aside{where}")


def load_catalog(path: Path | str) -> Catalog:
    """Load a catalogue artifact.

    Raises:
        UserError: not a catalogue, or a table of another form.
    """
    artifact = load_artifact(path, "catalog")
    with reading(artifact):
        table = pq.read_table(artifact.file("catalog.parquet")).cast(SCHEMA)
        table.validate(full=True)
        if pc.any(pc.match_substring_regex(table["image"], _LEADS_OUT)).as_py():
            raise UserError("a picture's path leads out of its root")
    config = artifact.card.config
    if config.get("reader") == "sample":
        return Catalog(table, artifact.path, artifact)
    if not isinstance(config.get("root"), str):
        raise UserError(f"{artifact.path}: its card does not say where the pictures are ('root'): build it again")
    return Catalog(table, picture_root(config.get("reader"), config["root"]), artifact)


def table_of(rows: list[Row]) -> pa.Table:
    """Rows as a table; refuses a role or split that is not known."""
    for column, known in (("role", ROLES), ("split", SPLITS)):
        strange = {str(row[column]) for row in rows} - set(known)
        if strange:
            raise UserError(f"catalogue: {column} '{sorted(strange)[0]}' is not known: use {', '.join(known)}")
    return pa.table({name: [row[name] for row in rows] for name in SCHEMA.names}, schema=SCHEMA)


def check_pictures(root: Path, rows: list[Row], skip_unreadable: bool) -> tuple[list[Row], list[Refused]]:
    """Decode every picture once and add its ``sha256``.

    Args:
        root: folder that ``image`` is relative to.
        rows: of a reader; one with ``refused`` is set aside for that reason.
        skip_unreadable: collect refusals instead of raising the first.

    Returns:
        the readable rows, and (image, reason) of the others.
    """
    good: list[Row] = []
    refused: list[Refused] = []
    with ThreadPoolExecutor(len(available_cpus())) as pool:
        for row, outcome in zip(rows, pool.map(lambda row: _check(root, row), rows), strict=True):
            if isinstance(outcome, str):
                good.append({**row, "sha256": outcome})
            elif skip_unreadable or "refused" in row:
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
    check_shares(validation, test, seed)
    products = table["product"].combine_chunks().dictionary_encode()
    names = sorted(products.dictionary.to_pylist())
    codes = pc.index_in(products.dictionary, pa.array(names)).to_numpy()[products.indices.to_numpy()]
    counts = np.bincount(codes, minlength=len(names))
    several = np.array([name for name, count in zip(names, counts.tolist(), strict=True) if count > 1], dtype=np.str_)
    np.random.default_rng(seed).shuffle(several)
    tests, validations = round(test * len(names)), round(validation * len(names))
    held = dict.fromkeys(several[:tests].tolist(), "test")
    held.update(dict.fromkeys(several[tests : tests + validations].tolist(), "validation"))
    for name, share in (("validation", validation), ("test", test)):
        if share and name not in held.values():
            raise UserError(
                f"{name} {share}: is none of {len(names)} products, {len(several)} of which have the two pictures "
                "that a query and its gallery need: raise it or add pictures"
            )
    splits = np.array([held.get(name, "train") for name in names], dtype=object)[codes]
    roles = table["role"].to_numpy().copy()
    asked = _order_in_product(table, codes, splits != "train") * 2 >= counts[codes]
    given = (splits == "train") | (roles != "train")
    roles[~given] = np.where(asked, "query", "gallery")[~given]
    columns = {"split": splits, "role": roles}
    return pa.table(
        {name: pa.array(columns[name], pa.string()) if name in columns else table[name] for name in SCHEMA.names},
        schema=SCHEMA,
    )


def check_shares(validation: float, test: float, seed: int) -> None:
    """Refuse shares of products that leave none to train on, and a seed below 0."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise UserError(f"validation {validation} and test {test}: shares of products, together less than 1")
    if seed < 0:
        raise UserError(f"seed: {seed}: give 0 or more")


def check_leaks(train: Catalog, evaluation: Catalog, allow: bool = False) -> dict[str, Any]:
    """Refuse training pictures or products that are also evaluated.

    Args:
        train: what is trained on.
        evaluation: what is scored.
        allow: return what is found instead of refusing it.

    Returns:
        for ``products`` and ``pictures``, where they are shared, their ``count`` and the ``first`` few by name.

    Raises:
        UserError: with the number and the first few of the shared ones.
    """
    found: dict[str, Any] = {}
    for column, key, what in (("product", "products", "products"), ("sha256", "pictures", "pictures (same bytes)")):
        trained = train.table[column].combine_chunks()
        scored = evaluation.table[column].combine_chunks()
        shared = sorted(trained.filter(pc.is_in(trained, scored)).drop_null().unique().to_pylist())
        if not shared:
            continue
        first = shared[:3]
        if column == "sha256":
            at = pc.index_in(pa.array(first), trained).to_pylist()
            first = [train.table["image"][row].as_py() for row in at]
        if not allow:
            raise UserError(
                f"leak: {len(shared)} {what} are both trained and scored, first {', '.join(first)}: split again"
            )
        found[key] = {"count": len(shared), "first": first}
    return found


def picture_root(reader: str | None, root: str) -> Path:
    """The folder that a reader's ``image`` column is relative to."""
    return Path(root).parent if reader == "csv" else Path(root)


def _order_in_product(table: pa.Table, codes: NDArray[np.int64], keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(n,) place of each kept row among its product's, which are all kept, by path and box; 0 for the others."""
    rows = np.flatnonzero(keep)
    part = table.take(rows)
    boxes = [str(box) for box in part["box"].to_pylist()]
    keys = list(zip(codes[rows].tolist(), part["image"].to_pylist(), boxes, strict=True))
    order = np.array(sorted(range(len(rows)), key=keys.__getitem__), dtype=np.int64)
    _, first, counts = np.unique(codes[rows][order], return_index=True, return_counts=True)
    places = np.zeros(len(table), dtype=np.int64)
    places[rows[order]] = np.arange(len(rows)) - np.repeat(first, counts)
    return places


def _check(root: Path, row: Row) -> str | ImageRefused:
    path, box = root / row["image"], row.get("box")
    if "refused" in row:
        return ImageRefused(path, row["refused"])
    try:
        data = read_picture(path)
        decode_bytes(data, path, None if box is None else tuple(box.values()), _CHECK_SIZE)
    except ImageRefused as refused:
        return refused
    return hashlib.sha256(data).hexdigest()
