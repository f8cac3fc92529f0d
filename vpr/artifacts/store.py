"""Self-describing artifact directories: ``card.json`` and the files it lists.

An artifact is written to a temporary directory beside its place and renamed into it, so a reader
sees all of it or none. Loading checks every file against its checksum and never unpickles. What a
killed writer leaves beside it is removed by the next one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpr import __version__
from vpr.artifacts.paths import CARD_NAME
from vpr.common.errors import UserError, explain_system_error
from vpr.common.hardware import environment
from vpr.common.locks import file_lock
from vpr.imaging.decode import ImageRejected
from vpr.imaging.preprocess import Preprocess

SCHEMA = 1
_MAX_CARD_BYTES = 4 << 20

Kind = Literal[
    "catalog",
    "teacher",
    "student",
    "views",
    "embeddings",
    "calibration",
    "onnx",
    "ranges",
    "engine",
    "serving",
    "report",
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Parent(_Part):
    """An artifact that this one was made from: its role, name and the sha256 of its card."""

    role: str
    name: str
    sha256: str


class FileEntry(_Part):
    """A file of the artifact: bytes and sha256."""

    size: int = Field(ge=0)
    sha256: str


class Embedding(_Part):
    """What the model puts out: dimension, whether L2-normalised, dtype."""

    dim: int = Field(ge=1, le=1 << 16)
    normalised: bool
    dtype: Literal["float32", "float16"]


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
    preprocess: Preprocess | None = None
    embedding: Embedding | None = None
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    catalog: dict[str, Any] | None = None
    metrics: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    files: dict[str, FileEntry] = {}


class CorruptArtifact(UserError):
    """A file of an artifact is missing or is not what was written."""


class CorruptCard(CorruptArtifact):
    """The card itself is none."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: where it is, its card, and the sha256 of that card."""

    path: Path
    card: Card
    sha256: str

    def file(self, name: str) -> Path:
        """Path of a listed file; :class:`UserError` if the card does not list it."""
        if name not in self.card.files:
            raise UserError(f"{self.path}: its card lists no file '{name}': give a {name!r}-bearing artifact")
        return self.path / name

    def as_parent(self, role: str) -> Parent:
        """This artifact as an entry of another's ``parents``."""
        return Parent(role=role, name=self.card.name, sha256=self.sha256)

    def parents(self, role: str) -> list[Parent]:
        """What this artifact was made from in that role."""
        return [parent for parent in self.card.parents if parent.role == role]

    def names(self, metric: str) -> tuple[str, ...]:
        """The names that a metric of the card lists, none if it is not there.

        Raises:
            UserError: it is anything else than a list of names.
        """
        listed = self.card.metrics.get(metric, [])
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise UserError(f"{self.path / CARD_NAME}: key 'metrics.{metric}' lists no names: make the artifact again")
        return tuple(listed)


@dataclass
class ArtifactWriter:
    """An artifact being written: put files under ``path`` and fill the fields of the card."""

    path: Path
    kind: Kind
    name: str
    config: dict[str, Any]
    parents: list[Parent]
    preprocess: Preprocess | None = None
    embedding: Embedding | None = None
    inputs: list[TensorSpec] = field(default_factory=list)
    outputs: list[TensorSpec] = field(default_factory=list)
    catalog: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    unlisted: frozenset[str] = frozenset()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def write_artifact(
    path: Path | str, kind: Kind, config: Mapping[str, Any], parents: list[Parent] | None = None
) -> Iterator[ArtifactWriter]:
    """Write an artifact so that it appears whole or not at all.

    Folders named in ``draft.unlisted`` are moved along but not listed in the card (a catalogue's
    images: their checksums stand in its table).

    Args:
        path: where the finished directory will be; an older artifact there is replaced, any other
            non-empty directory is refused.
        kind: kind of artifact.
        config: plain JSON values, everything needed to do it again.
        parents: what it is made from.

    Yields:
        the draft, whose ``path`` is a temporary directory on the same file system.
    """
    target = Path(path)
    check_output(target, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(_lock(target)):
        _remove_leftovers(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            draft = ArtifactWriter(temporary, kind, target.name, json.loads(json.dumps(dict(config))), parents or [])
            yield draft
            _write_card(draft)
            _swap(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_output(path: Path | str, kind: Kind, holds: str = "") -> None:
    """Refuse an output that an artifact of this kind may not replace; long work asks before it starts.

    Args:
        path: of the output.
        kind: of what will be written.
        holds: a file that an older artifact there must have, where several verbs write the kind.
    """
    target = Path(path)
    if target.is_symlink():
        raise UserError(f"{target}: is a link: name the folder itself that the output is to be")
    _restore_previous(target)
    if not target.name:
        raise UserError(f"{path!r}: names no folder of its own: choose another output")
    if target.exists() and not (target / CARD_NAME).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an artifact: choose another output or remove it")
    _reject_other_kind(target, kind, holds)


def load_artifact(path: Path | str, kind: Kind | tuple[Kind, ...] | None = None) -> Artifact:
    """Load an artifact and verify every file it lists.

    Raises:
        UserError: if it is missing, of another kind, of a newer schema, or any file differs.
    """
    root = Path(path)
    wanted = (kind,) if isinstance(kind, str) else kind
    while True:
        raw = _read_card(root)
        card = _parse_card(root / CARD_NAME, raw)
        if wanted and card.kind not in wanted:
            raise UserError(f"{root}: is a {card.kind} artifact, a {' or '.join(wanted)} is needed: give another path")
        try:
            for name, entry in card.files.items():
                _verify_file(root, name, entry)
        except (CorruptArtifact, FileNotFoundError):
            if _read_card(root) == raw:
                raise
            continue  # another process has replaced the artifact meanwhile
        return Artifact(root, card, hashlib.sha256(raw).hexdigest())


@contextmanager
def reraise_as_artifact_error(artifact: Artifact) -> Iterator[None]:
    """Turn what a reader of an artifact's card and files stumbles over into one line that names it.

    The checksums tell a changed file; this is for one that was written wrong.
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, UserError)
        # What the machine lacks is no fault of the artifact.
        if (
            isinstance(error, ImageRejected)
            or (told and str(artifact.path) in str(error))
            or explain_system_error(error)
        ):
            raise
        reason = f"{'' if told else type(error).__name__ + ': '}{' '.join(str(error).split())[:200]}"
        raise UserError(f"{artifact.path}: is no usable {artifact.card.kind} ({reason}): make it again") from None


def find_up_to_date(
    path: Path | str, kind: Kind, config: Mapping[str, Any], parents: list[Parent], holds: str = ""
) -> Artifact | None:
    """The finished, undamaged artifact at ``path`` if it was made from these very parents and config, else None.

    Where it is None the work begins, whose result may be written there: anything else is refused now.

    Raises:
        UserError: see :func:`check_output`, whose ``holds`` is given; or a parent is there.
    """
    target = Path(path)
    if _leftovers(target):
        with file_lock(_lock(target)):
            _remove_leftovers(target)
    artifact = None
    if (target / CARD_NAME).is_file():
        with suppress(CorruptArtifact):  # it is about to be made again
            artifact = load_artifact(path)
    if artifact is not None:
        card = artifact.card
        if (card.kind, card.config, card.parents) == (kind, json.loads(json.dumps(dict(config))), parents):
            return artifact
        if read := [parent.role for parent in parents if parent.sha256 == artifact.sha256]:
            raise UserError(f"{target}: is the {read[0]} that is read, and would be replaced: choose another output")
    check_output(path, kind, holds)
    return None


def read_card_file(path: Path) -> bytes:
    """The bytes of a card, if that is a plain file of a card's size.

    Raises:
        CorruptCard: it is something else.
        OSError: it is not there, or cannot be read.
    """
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode):  # a link can lead anywhere, a pipe or a device never ends
        raise CorruptCard(f"{path}: is no plain file: artifacts hold plain files, make it again")
    if state.st_size > _MAX_CARD_BYTES:
        raise CorruptCard(f"{path}: larger than {_MAX_CARD_BYTES} bytes: not a card, make the artifact again")
    return path.read_bytes()


def _read_card(root: Path) -> bytes:
    for _ in range(2):
        with suppress(FileNotFoundError, NotADirectoryError):
            return read_card_file(root / CARD_NAME)
        _restore_previous(root)
    raise UserError(f"{root}: no artifact here (no {CARD_NAME}): check the path, or make it first")


def _parse_card(path: Path, raw: bytes) -> Card:
    try:
        values = json.loads(raw)
        version = values["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptCard(f"{path}: not a card (broken JSON or no 'schema'): make the artifact again") from None
    if not isinstance(version, int) or version > SCHEMA:
        raise UserError(
            f"{path}: card schema {version!r}, this version reads up to {SCHEMA}: upgrade visual-product-recognition"
        )
    try:
        return Card.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CorruptCard(f"{path}: key '{key}': {first['msg']}: make the artifact again") from None


def _reject_other_kind(target: Path, kind: Kind, holds: str) -> None:
    """An output that names an input, or another verb's result, by slip, must not replace it."""
    try:
        card = json.loads(read_card_file(target / CARD_NAME))
        found, files = card["kind"], list(card.get("files", ()))
    except (CorruptArtifact, OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if found != kind:
        raise UserError(f"{target}: holds a {found} artifact, a {kind} would replace it: choose another output")
    if holds and holds not in files:
        raise UserError(f"{target}: holds a {kind} without {holds}, of another command: choose another output")


def _verify_file(root: Path, name: str, entry: FileEntry) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise UserError(f"{root / CARD_NAME}: file name '{name}' leaves the artifact: do not use it")
    path = root / name
    # os.path, to which a name too long for the file system is no file; pathlib raises.
    if any(os.path.islink(p) for p in (path, *path.parents) if root in p.parents):
        raise UserError(f"{path}: is a symbolic link: artifacts hold plain files, make it again")
    if not os.path.isfile(path):
        raise CorruptArtifact(f"{path}: missing: copy the artifact again or make it again")
    if path.stat().st_size != entry.size or file_sha256(path) != entry.sha256:
        raise CorruptArtifact(
            f"{path}: changed since it was written (checksum differs): copy or make the artifact again"
        )


def _write_card(draft: ArtifactWriter) -> None:
    files = {}
    for path in sorted(draft.path.rglob("*")):
        name = path.relative_to(draft.path).as_posix()
        if path.is_file() and name.split("/")[0] not in draft.unlisted:
            _sync(path)
            files[name] = FileEntry(size=path.stat().st_size, sha256=file_sha256(path))
    card = Card(
        schema=SCHEMA,
        kind=draft.kind,
        name=draft.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code_version=__version__,
        config=draft.config,
        parents=draft.parents,
        preprocess=draft.preprocess,
        embedding=draft.embedding,
        inputs=draft.inputs,
        outputs=draft.outputs,
        catalog=draft.catalog,
        metrics=draft.metrics,
        environment=environment(),
        files=files,
    )
    path = draft.path / CARD_NAME
    path.write_text(card.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")
    _sync(path)
    for folder in {path.parent for path in (draft.path / CARD_NAME, *(draft.path / name for name in files))}:
        _sync(folder)
    draft.path.chmod(0o755)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _lock(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


def _swap(new: Path, target: Path) -> None:
    # Directories cannot be exchanged portably in one call; `_remove_leftovers` repairs a kill between the two renames.
    if target.exists():
        target.rename(_previous(target))
    new.rename(target)
    _sync(target.parent)
    if _previous(target).exists():
        _previous(target).rename(new)  # the temporary one, which is removed; one named "previous" is always whole


def _leftovers(target: Path) -> list[Path]:
    """What a killed writer has left, or one that is at work has there."""
    partial = target.parent.glob(f".{glob.escape(target.name)}.partial-*")
    return [*partial, *(path for path in (_previous(target), _lock(target)) if path.exists())]


def _remove_leftovers(target: Path) -> None:
    """Mend and remove what killed writers have left; its lock is held."""
    if _previous(target).is_dir() and not target.exists():
        _previous(target).rename(target)
    for path in _leftovers(target):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _restore_previous(target: Path) -> None:
    """Bring an artifact back that has no name between the two renames of a swap, if that swap was killed."""
    if _previous(target).is_dir() and not target.exists():
        with file_lock(_lock(target)):
            _remove_leftovers(target)


def config_to_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON values, without its ``output`` (where it lies is not what it is)."""
    values = json.loads(json.dumps(asdict(config), default=str))
    values.pop("output", None)
    return values
