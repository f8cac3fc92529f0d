"""The card of an artifact: its fields, its bounds, and how it is read."""

import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess

SCHEMA = 2
_MAX_CARD_BYTES = 4 << 20

Kind = Literal[
    "catalog", "teacher", "student", "views", "embeddings", "onnx", "ranges", "engine", "serving",
    "report", "threshold", "gallery", "migration",
]  # fmt: skip


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Licence of weights: an SPDX identifier or a short text.
MAX_LICENCE = 100
Licence = Annotated[str, Field(min_length=1, max_length=MAX_LICENCE)]
UNKNOWN_LICENCE = "unknown"


class Parent(_Part):
    """An artifact that this one was made from: its role, its name and the sha256 of its card.

    ``licences`` are those of the artifact. The sha256 determines them, so they are no part of the identity: entries
    written before cards had licences are equal to those of today.
    """

    role: str
    name: str
    sha256: str
    licences: list[Licence] = []

    @property
    def identity(self) -> dict[str, str]:
        """Values that determine the artifact, as JSON."""
        return {"role": self.role, "name": self.name, "sha256": self.sha256}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Parent) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(tuple(self.identity.values()))


def combine_licences(own: Iterable[str], parents: Iterable[Parent]) -> list[str]:
    """Return an artifact's licences and those of its parents, sorted; empty if all are unknown.

    Next to known licences, ``unknown`` stays, so that a parent without a licence is not hidden.
    """
    found = {*own, *(licence for parent in parents for licence in parent.licences)}
    return [] if found <= {UNKNOWN_LICENCE} else sorted(found)


class FileEntry(_Part):
    """Size in bytes and sha256 of a file."""

    size: int = Field(ge=0)
    sha256: str


class Embedding(_Part):
    """Output of a model: dimension, L2-normalised or not, dtype.

    ``nested`` are the dimensions of trained prefixes: the first 64, renormalised, are an embedding themselves.
    """

    dim: int = Field(ge=1, le=1 << 16)
    normalised: bool
    dtype: Literal["float32", "float16"]
    nested: list[Annotated[int, Field(ge=1, le=1 << 16)]] = Field(default=[], max_length=64)

    def cut(self, dimensions: int) -> "Embedding":
        """Return the embedding of the first ``dimensions``."""
        nested = [width for width in self.nested if width < dimensions]
        return self.model_copy(update={"dim": dimensions, "nested": nested})


class TensorSpec(_Part):
    """One input or output; a named dimension (``"batch"``) is dynamic."""

    name: str
    dtype: str
    shape: list[int | str]


class Card(_Part):
    """Everything needed to use an artifact and to make it again."""

    version: int = Field(alias="schema", ge=1)
    kind: Kind
    name: str
    created: str
    code_version: str
    config: dict[str, Any]
    parents: list[Parent] = []
    licences: list[Licence] = []  # of the weights, with those of the parents; empty if unknown
    preprocess: Preprocess | None = None
    embedding: Embedding | None = None
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    catalog: dict[str, Any] | None = None
    metrics: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    files: dict[str, FileEntry] = {}

    @field_validator("preprocess")
    @classmethod
    def _check_network_input(cls, value: Preprocess | None, info: ValidationInfo) -> Preprocess | None:
        """Only exported graphs normalise inside; PyTorch networks take normalised float32."""
        if value is not None and info.data.get("kind") in ("teacher", "student") and value != value.float_input:
            raise ValueError("a teacher or student takes float32 in NCHW")
        return value


class CorruptArtifact(UserError):
    """A file of an artifact is missing or differs from what was written."""


class CorruptCard(CorruptArtifact):
    """The card cannot be read as a card."""


def read_card_file(path: Path) -> bytes:
    """Return the bytes of a card; raise :class:`CorruptCard` for no plain or a too large file, or an OSError."""
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode):  # a link can lead anywhere, a pipe or a device never ends
        raise CorruptCard(f"{path}: not a plain file. Artifacts hold plain files: make it again.")
    if state.st_size > _MAX_CARD_BYTES:
        raise CorruptCard(f"{path}: larger than {_MAX_CARD_BYTES} bytes, so not a card. Make the artifact again.")
    return path.read_bytes()


def parse_card(path: Path, raw: bytes) -> Card:
    """Return the card in ``raw``; ``path`` is named in errors.

    Raises:
        UserError: The card has a newer schema than this version reads.
        CorruptCard: The bytes are not JSON, or a key is missing or has a wrong value.
    """
    try:
        version = json.loads(raw)["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptCard(f"{path}: not a card (broken JSON or no 'schema'). Make the artifact again.") from None
    if not isinstance(version, int) or version > SCHEMA:
        hint = "Upgrade visual-product-recognition."
        raise UserError(f"{path}: expected card schema up to {SCHEMA}, got {version!r}. {hint}")
    if version < SCHEMA:
        raise CorruptCard(f"{path}: expected card schema {SCHEMA}, got {version!r}. Make the artifact again.")
    try:
        return Card.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CorruptCard(f"{path}: key '{key}': {first['msg']}. Make the artifact again.") from None
