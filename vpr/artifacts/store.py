"""Artifact directories (``card.json`` and the files it lists): loading with checksums, nothing unpickled."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vpr.artifacts.card import (
    UNKNOWN_LICENCE,
    Card,
    CorruptArtifact,
    FileEntry,
    Kind,
    Parent,
    parse_card,
    read_card_file,
)
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.replace import restore_previous
from vpr.common.errors import UserError, explain_system_error
from vpr.imaging.decode import ImageRejected

# A file changed within this time before it was hashed may change again without a new time stamp. Git calls such
# entries "racily clean"; file systems stamp in steps of up to 10 ms.
_RACY_NS = 100_000_000
_verified: dict[str, tuple[tuple[int, ...], str]] = {}


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its directory, its card, and the sha256 of that card."""

    path: Path
    card: Card
    sha256: str

    def file(self, name: str) -> Path:
        """Return the path of a listed file; raise :class:`UserError` for another name."""
        if name not in self.card.files:
            listed = ", ".join(sorted(self.card.files)[:5]) or "none"
            raise UserError(f"{self.path}: the artifact has no file '{name}'. Expected one of its files: {listed}.")
        return self.path / name

    def as_parent(self, role: str) -> Parent:
        """Return this artifact as an entry of another artifact's ``parents``."""
        # A catalogue has no weights, so it needs no licence; a model without one passes on that it is unknown.
        unknown = [] if self.card.kind == "catalog" else [UNKNOWN_LICENCE]
        return Parent(role=role, name=self.card.name, sha256=self.sha256, licences=self.card.licences or unknown)

    def require_licence(self) -> None:
        """Raise :class:`UserError` unless the licences of the weights and of all that they come from are known."""
        problem = "" if self.card.licences else "no licence is recorded"
        if UNKNOWN_LICENCE in self.card.licences:
            problem = "a model that it comes from has no recorded licence"
        if problem:
            raise UserError(f"{self.path}: {problem}. Set --tower.licence in the training of its teacher.")

    def parents(self, role: str) -> list[Parent]:
        """Return the parents of that role."""
        return [parent for parent in self.card.parents if parent.role == role]

    def networks(self) -> list[Parent]:
        """Return the parent whose network a graph, an engine or ranges compute: a teacher or a student."""
        return [*self.parents("student"), *self.parents("teacher")]

    def names(self, metric: str) -> tuple[str, ...]:
        """Return the names that a metric of the card lists, if any; raise :class:`UserError` for other values."""
        names = self.card.metrics.get(metric, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{self.path / CARD_NAME}: 'metrics.{metric}' is not a list of names. Make it again.")
        return tuple(names)


_REMEDIES = {  # by expected and found kind
    ("embeddings", "gallery"): "Search it with `vpr gallery search`, or write embeddings with `vpr gallery export`.",
    ("onnx", "student"): "Run `vpr export onnx` first.",
    ("gallery", "embeddings"): "Run `vpr gallery create` first.",
}


def file_sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_artifact(path: Path | str, kind: Kind | tuple[Kind, ...] | None = None) -> Artifact:
    """Load an artifact and verify its files; each file is hashed once per process unless it changes.

    Raises:
        UserError: The artifact is missing, of another kind or of a newer schema, or a file differs.
    """
    root = Path(path)
    kinds = (kind,) if isinstance(kind, str) else kind
    while True:
        raw = _read_card(root)
        card = parse_card(root / CARD_NAME, raw)
        if kinds and card.kind not in kinds:
            remedies = (text for kind in kinds if (text := _REMEDIES.get((kind, card.kind))))
            remedy = f" {text}" if (text := next(remedies, "")) else ""
            raise UserError(f"{root}: expected an artifact of kind {' or '.join(kinds)}, got {card.kind}.{remedy}")
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
    """Raise errors of reading an artifact's files as one :class:`UserError` that names it.

    Checksums find files that changed later. This finds files that were written wrong.
    """
    try:
        yield
    except Exception as error:
        is_user_error = isinstance(error, UserError)
        names_artifact = is_user_error and str(artifact.path) in str(error)
        # What the machine lacks is no fault of the artifact.
        if isinstance(error, ImageRejected) or names_artifact or explain_system_error(error):
            raise
        reason = f"{'' if is_user_error else type(error).__name__ + ': '}{' '.join(str(error).split())[:200]}"
        message = f"{artifact.path}: not a usable {artifact.card.kind} ({reason.rstrip('.')}). Make it again."
        raise UserError(message) from None


def _read_card(root: Path) -> bytes:
    for _ in range(2):
        with suppress(FileNotFoundError, NotADirectoryError):
            return read_card_file(root / CARD_NAME)
        restore_previous(root)
    fix = "Check the path, or make the artifact first"
    fix += "; separate paths by spaces" if "," in str(root) else ""
    raise UserError(f"{root}: no artifact here ({CARD_NAME} is missing). {fix}.")


def _verify_file(root: Path, name: str, entry: FileEntry) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise UserError(f"{root / CARD_NAME}: file name '{name}' leads out of the artifact. Do not use this artifact.")
    path = root / name
    # os.path, because pathlib raises for a name that is too long for the file system.
    if any(os.path.islink(p) for p in (path, *path.parents) if root in p.parents):
        raise UserError(f"{path}: a symbolic link. Artifacts hold plain files: make the artifact again.")
    if not os.path.isfile(path):
        raise CorruptArtifact(f"{path}: missing. Copy the artifact again or make it again.")
    if path.stat().st_size != entry.size or _sha256_once(path) != entry.sha256:
        raise CorruptArtifact(f"{path}: changed since it was written (checksum differs). Copy or make it again.")


def _sha256_once(path: Path) -> str:
    """Return the sha256 of a file, from memory if the file has not changed since this process hashed it."""
    key, before = str(path.absolute()), time.time_ns()
    state = path.stat()
    signature = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    if key in _verified and _verified[key][0] == signature:
        return _verified[key][1]
    digest = file_sha256(path)
    if max(state.st_mtime_ns, state.st_ctime_ns) < before - _RACY_NS:
        _verified[key] = (signature, digest)
    return digest
