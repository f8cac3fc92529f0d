"""Tables of vectors in LanceDB: each change is one new version, and readers keep the version that they opened.

The only module that imports LanceDB, an optional package. Its tables are folders of data files, of lists of removed
rows, and of one manifest for each version. A manifest that is renamed into place makes a version visible.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpr.common.errors import UserError, explain_system_error, is_out_of_memory

Vectors = NDArray[np.float32]
RowIds = NDArray[np.uint64]

ROW_ID = "_rowid"
_TABLE = "images"
_INDEX = "vector_idx"
_PARTITIONS = "partitions"  # of the index, in the metadata of the schema
_BATCH_ROWS = 16_384
_NO_ANSWER = re.compile(
    r"error sending request|connect(ion)? (error|ref\w+)|dispatch failure|dns error|timed? ?out|trying to connect",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b40[013]\b|forbidden|unauthori[sz]ed|credentials|access ?denied", re.IGNORECASE)
_FAILED = re.compile(r"Query Execution error|not implemented", re.IGNORECASE)  # such as a cast of a stored text
_LOST_FILE = re.compile(r"not found|no such file|NoSuchKey|no longer exists", re.IGNORECASE)
# LanceDB computes a chain of operators by recursion, which crashes the process (apache/datafusion#22229): 490 additions
# were computed, 1,000 crashed. Conditions that AND and OR join are no such chain.
_MAX_CHAIN = 256
_MAX_CONDITION = 1 << 20  # characters, for which LanceDB takes 115 times as much memory
_PANIC = "RustPanic"  # of LanceDB's bindings, for some files that are no table
_MAX_DIGITS = 6  # of a number of partitions
# Functions and types of conditions. Others, such as `repeat`, build texts and lists of any size from a few characters.
_FUNCTION_NAMES = (
    "in and or not like ilike between is when then else case cast try_cast values any all lower upper trim "
    "btrim ltrim rtrim substr substring strpos length char_length character_length octet_length starts_with "
    "ends_with contains regexp_like regexp_match concat coalesce nullif greatest least abs ceil floor round "
    "trunc sqrt power exp ln log log10 sign isnan char varchar decimal numeric date to_date date_part extract "
    "timestamp"
)
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_COMMENT = re.compile(r"--|/\*")
_CALL = re.compile(r"([\w.]+|'')\s*\(")
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`""")
_JOINED = re.compile(r"\b(?:AND|OR)\b", re.IGNORECASE)
_SIGN = re.compile(r"([(,])\s*-")  # of a number in a list
_OPERATOR = re.compile(r"[-+*/%|&^#~<>=!]+|::|\[|\b(?:IS|I?LIKE|BETWEEN|IN)\b", re.IGNORECASE)
# Of the client of object storage. Without them it repeats requests for minutes.
_STORAGE_OPTIONS = {"connect_timeout": "5s", "timeout": "60s", "client_max_retries": "2", "client_retry_timeout": "20"}


class LostFile(UserError):
    """A file of the version is missing, such as after another process compacted the gallery."""


class InvalidCondition(UserError):
    """A condition in SQL is invalid."""


@dataclass(frozen=True)
class Version:
    """A version of a table: its number, and the time of its change in ISO format."""

    number: int
    created: str


class Store:
    """A table at an address: a folder of this machine, or one of object storage."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._database = self._connect()

    def create(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
        """Write the first version; raise :class:`UserError` if the address has a table."""
        with self._errors():
            if _TABLE in self._database.list_tables().tables:
                problem = "there are vectors of a gallery, or of a `vpr gallery create` that was killed"
                fix = "Choose another address, or delete what is at this one if no gallery uses it"
                raise UserError(f"address: {self.address}: {problem}. {fix}.")
            self._database.create_table(_TABLE, pa.RecordBatchReader.from_batches(schema, batches))

    def open(self, version: int = 0) -> Snapshot:
        """Open a version, 0 for the newest; it does not change.

        Raises:
            UserError: There is no table, it has no such version, or the server does not answer.
        """
        with self._errors():
            table = self._database.open_table(_TABLE)
            newest = table.version
            if version > newest:
                raise UserError(f"version: the gallery has versions up to {newest}, got {version}.")
            try:
                table.checkout(version or newest)
            except (RuntimeError, ValueError) as error:
                if not version or not _LOST_FILE.search(str(error)):
                    raise
                problem = f"version {version} was removed by `vpr gallery compact`"
                raise UserError(f"version: {problem}. Leave out --version for the newest, {newest}.") from None
            return Snapshot(self, table)

    def append(self, rows: pa.Table) -> None:
        """Add rows as one version."""
        with self._errors():
            self._database.open_table(_TABLE).add(rows)

    def replace(self, rows: pa.Table, keys: Sequence[str]) -> None:
        """Replace the rows with the same keys and add the others, as one version."""
        with self._errors():
            merge = self._database.open_table(_TABLE).merge_insert(list(keys))
            merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def delete(self, condition: str) -> None:
        """Remove the rows that fulfil a condition in SQL, as one version."""
        with self._errors():
            self._database.open_table(_TABLE).delete(condition)

    def overwrite(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
        """Replace all rows and the schema, as one version; older versions stay.

        An index is built again, as a second version. The first one has no index, but its number of partitions.
        """
        with self._errors():
            partitions = _partitions_of(self._database.open_table(_TABLE))
            _build_index(self._overwrite(batches, schema, partitions), partitions)

    def rewrite(self, partitions: int) -> None:
        """Write the newest version's rows into new files, and remove all other files.

        Readers of another version get :class:`LostFile` from then on. Killed at any moment, the newest version has the
        same rows.

        Args:
            partitions: Partitions of an IVF index; 0 keeps an existing index's number, or no index.

        Raises:
            UserError: There are fewer rows than ``partitions``; nothing is changed.
        """
        with self._errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # LanceDB's, that readers of other versions fail
            old = self._database.open_table(_TABLE)
            old.checkout(old.version)
            count = old.count_rows()
            if count < partitions:
                fix = f"Use --index {count} or less" if count else "Add images first"
                raise UserError(f"index: {partitions} partitions need as many images, the gallery has {count}. {fix}.")
            partitions = partitions or _partitions_of(old)
            rows = old.search().limit(None).to_batches(batch_size=_BATCH_ROWS) if count else ()
            table = self._overwrite(rows, old.schema, partitions)
            # Before the index is built, because it joins the small partitions of one (lance-format/lance#6380): 64
            # partitions of 60,000 vectors became 8.
            table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
            _build_index(table, partitions)

    def _overwrite(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema, partitions: int) -> Any:
        """Write rows with a schema, and the number of partitions of an index, as a new version; return the table."""
        # Taken from the reader's batches: its schema lacks the metadata.
        schema = schema.with_metadata({**(schema.metadata or {}), _PARTITIONS.encode(): str(partitions).encode()})
        reader = pa.RecordBatchReader.from_batches(schema, (_with_schema(batch, schema) for batch in batches))
        return self._database.create_table(_TABLE, reader, mode="overwrite")

    def _connect(self) -> Any:
        try:
            import lancedb
        except ImportError:
            install = "Run `make gallery`, or pip install -r requirements-gallery.txt"
            raise UserError(f"gallery: the optional package lancedb is not installed. {install}.") from None
        is_remote = "://" in self.address
        # LanceDB reads `shop:stock` as an address of a scheme `shop`, and replaces a `~` by the home folder.
        address = self.address if is_remote else os.path.abspath(self.address)
        with self._errors():
            return lancedb.connect(address, storage_options=_STORAGE_OPTIONS if is_remote else None)

    @contextmanager
    def _errors(self, where: str = "") -> Iterator[None]:
        """Raise LanceDB's errors as one :class:`UserError`, those of a condition as such; those of the machine stay."""
        try:
            yield
        except Exception as error:
            is_known = isinstance(error, RuntimeError | ValueError | OSError)
            if isinstance(error, UserError) or not (is_known or type(error).__name__ == _PANIC):
                raise
            text = re.sub(r",? ?/\S*\.rs:\d+(:\d+)?", "", " ".join(str(error).split())).removeprefix("lance error: ")
            if explain_system_error(error) or is_out_of_memory(error):
                raise
            if "://" in self.address and _DENIED.search(text):
                fix = "Check the credentials in the environment variables of its client"
                raise UserError(f"address: {self.address}: access denied ({text[:200]}). {fix}.") from None
            if "://" in self.address and _NO_ANSWER.search(text):
                problem = f"the server does not answer ({text[:200]})"
                raise UserError(f"address: {self.address}: {problem}. Check the address and the network.") from None
            if _LOST_FILE.search(text):
                problem = f"a file or the table is missing ({text[:200]})"
                raise LostFile(f"{self.address}: {problem}. Check the path, or restore the gallery.") from None
            if where and (isinstance(error, ValueError) or _FAILED.search(text)):
                reason = text.removeprefix("Invalid input, ").rstrip(".")[:300]
                quotes = " Texts are in single quotes." if "No field named" in reason and '"' in where else ""
                raise InvalidCondition(f"where: '{where[:100]}': {reason}. Correct the condition.{quotes}") from None
            raise UserError(
                f"{self.address}: LanceDB reports: {text.rstrip('.')[:300]}. See docs/gallery.md."
            ) from None


class Snapshot:
    """One version of a table.

    Attributes:
        version: Number of the version.
        schema: Schema of the table.
        partitions: Partitions of the index, which may not be built yet (:meth:`index`); 0 for a gallery without one.
    """

    def __init__(self, store: Store, table: Any) -> None:
        self._store, self._table = store, table
        self.version = int(table.version)
        self.schema: pa.Schema = table.schema
        self.partitions = _partitions_of(table)

    def __len__(self) -> int:
        with self._store._errors():
            return int(self._table.count_rows())

    def count(self, where: str) -> int:
        """Return the number of rows that fulfil a condition in SQL."""
        with self._store._errors(where):
            return int(self._table.count_rows(_complete(where)))

    def batches(self, columns: Sequence[str], where: str = "") -> Iterator[pa.RecordBatch]:
        """Yield all rows, or those that fulfil a condition in SQL, with their ``_rowid``, in parts.

        Raises:
            UserError: The condition is invalid.
            LostFile: Another process removed the version.
        """
        with self._store._errors(where):
            query = self._table.search().with_row_id(True).select(list(columns)).limit(None)
            if where:
                query = query.where(_complete(where))
            yield from query.to_batches(batch_size=_BATCH_ROWS)

    def read(self, columns: Sequence[str], where: str = "") -> pa.Table:
        """Return all rows, or those that fulfil a condition in SQL, as :meth:`batches` yields them."""
        parts = list(self.batches(columns, where))
        fields = [*(self.schema.field(name) for name in columns), pa.field(ROW_ID, pa.uint64())]
        return pa.Table.from_batches(parts, parts[0].schema) if parts else pa.schema(fields).empty_table()

    def take(self, rows: RowIds, columns: Sequence[str]) -> pa.Table:
        """Return the rows with these (n,) uint64 ids, in this order."""
        with self._store._errors():
            unique, inverse = np.unique(rows, return_inverse=True)
            if not len(unique):
                return pa.schema([self.schema.field(name) for name in columns]).empty_table()
            found = self._table.take_row_ids(unique.tolist()).select(list(columns)).with_row_id().to_arrow()
            order = np.argsort(found[ROW_ID].to_numpy())
            return found.take(pa.array(order[inverse]))

    def probe(self, query: Vectors, count: int, probes: int, where: str = "") -> tuple[NDArray[np.float32], RowIds]:
        """Search the index for one (dim,) query; return up to ``count`` inner products, falling, and row ids.

        Rows that were added after the index was built are compared without it. If the nearest ``probes`` partitions
        have fewer than ``count`` rows that fulfil the condition, the other partitions are searched too.
        """
        with self._store._errors(where):
            builder = self._table.search(query).distance_type("dot").nprobes(probes).with_row_id(True).limit(count)
            if where:
                builder = builder.where(_complete(where), prefilter=True)
            builder = builder.select(["product", "_distance"])
            found = builder.to_arrow()
            if len(found) < count:
                found = builder.maximum_nprobes(0).to_arrow()  # no maximum, which would cost time in each search
        return 1 - found["_distance"].to_numpy(), found[ROW_ID].to_numpy()

    def index(self) -> dict[str, int] | None:
        """Return the numbers of partitions, and of images in and outside of the index; None without an index."""
        with self._store._errors():
            state = self._table.index_stats(_INDEX) if self.partitions else None
            if state is None:
                return None
            return {"partitions": self.partitions, "images": state.num_indexed_rows, "others": state.num_unindexed_rows}

    def versions(self) -> list[Version]:
        """Return the versions that are still stored, oldest first."""
        with self._store._errors():
            rows = sorted(self._table.list_versions(), key=lambda row: row["version"])
        return [Version(row["version"], row["timestamp"].isoformat(timespec="seconds")) for row in rows]


def _build_index(table: Any, partitions: int) -> None:
    """Build the index of a table as a new version, unless it has fewer rows than partitions or is to have none."""
    from lancedb.index import IvfFlat

    if partitions and table.count_rows() >= partitions:
        config = IvfFlat(distance_type="dot", num_partitions=partitions)
        table.create_index("vector", config=config, name=_INDEX)


def _partitions_of(table: Any) -> int:
    """Return the number of partitions that a schema records; :class:`ValueError` for no such number."""
    text = (table.schema.metadata or {}).get(_PARTITIONS.encode(), b"0")
    if not text.isdigit() or len(text) > _MAX_DIGITS:
        raise ValueError(f"the number of partitions is recorded as {text[:20]!r}")
    return int(text)


def _with_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([batch[name] for name in schema.names], schema=schema)


def _complete(where: str) -> str:
    """Return a condition in brackets. Without them LanceDB 0.40 ignores what follows a complete condition.

    Raises:
        InvalidCondition: The condition has a chain of operators that crashes LanceDB, or a function that builds values.
    """
    if problem := _find_problem(where):
        raise InvalidCondition(f"where: '{where[:100]}': {problem}. Correct the condition.")
    parts = _JOINED.split(_SIGN.sub(r"\1", _QUOTED.sub("''", where)))
    if (count := max(len(_OPERATOR.findall(part)) for part in parts)) > _MAX_CHAIN:
        problem = f"a chain of {count} operators, expected at most {_MAX_CHAIN}"
        raise InvalidCondition(f"where: '{where[:100]}': {problem}. Shorten it.")
    return f"({where})"


def _find_problem(where: str) -> str:
    """Return the problem of a condition that LanceDB would run, or an empty text."""
    if len(where) > _MAX_CONDITION:
        return f"{len(where)} characters, expected at most {_MAX_CONDITION}"
    plain = _QUOTED.sub("''", where)
    if _COMMENT.search(plain):
        return "a comment"
    depth = 0
    for character in plain:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return "a bracket that closes none"
    called = (name for name in _CALL.findall(plain) if name.lower() not in _FUNCTIONS)
    if name := next(called, ""):
        return f"the function {name if name != chr(39) * 2 else 'with a quoted name'} is not supported"
    return ""


def quote(values: Iterable[str]) -> str:
    """Return texts as a list of SQL."""
    return ", ".join("'{}'".format(value.replace("'", "''")) for value in values)
