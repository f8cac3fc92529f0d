"""Writing of artifacts: into a temporary directory that is renamed into place, so readers see all of it or nothing."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vpr import __version__
from vpr.artifacts.card import (
    SCHEMA,
    Card,
    CorruptArtifact,
    Embedding,
    FileEntry,
    Kind,
    Parent,
    TensorSpec,
    combine_licences,
    read_card_file,
)
from vpr.artifacts.identity import identity
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.replace import leftovers, lock_path, remove_leftovers, replace_directory, restore_previous, sync
from vpr.artifacts.store import Artifact, file_sha256, load_artifact
from vpr.common.config_values import config_values
from vpr.common.errors import UserError
from vpr.common.hardware import environment
from vpr.common.locks import file_lock
from vpr.imaging.preprocess import Preprocess

_DERIVED = ("network", "tower_config")  # follow from other keys of a configuration
_MAX_KEYS = 6


@dataclass
class ArtifactWriter:
    """An artifact being written: put files under ``path`` and fill the fields of the card."""

    path: Path
    kind: Kind
    name: str
    config: dict[str, Any]
    parents: list[Parent]
    licences: list[str] = field(default_factory=list)  # without those of the parents, which are added
    preprocess: Preprocess | None = None
    embedding: Embedding | None = None
    inputs: list[TensorSpec] = field(default_factory=list)
    outputs: list[TensorSpec] = field(default_factory=list)
    catalog: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    unlisted: frozenset[str] = frozenset()


@contextmanager
def write_artifact(
    path: Path | str, kind: Kind, config: Mapping[str, Any], parents: list[Parent] | None = None
) -> Iterator[ArtifactWriter]:
    """Write an artifact so that it appears complete or not at all.

    Yields a writer of a temporary directory on the same file system. An old artifact at ``path`` is replaced, any other
    non-empty directory is rejected. ``config`` holds JSON values, everything needed to make the artifact again.
    Files and folders named in ``ArtifactWriter.unlisted`` are moved along but not listed in the card (a catalogue's
    images: its table has their checksums).
    """
    target = Path(path)
    check_output(target, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(lock_path(target)):
        remove_leftovers(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            writer = ArtifactWriter(temporary, kind, target.name, json.loads(json.dumps(dict(config))), parents or [])
            yield writer
            _write_card(writer)
            replace_directory(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_output(path: Path | str, kind: Kind, required_file: str = "") -> None:
    """Check that an artifact of this kind may replace what is at ``path``; long work calls this before it starts.

    If several commands write the kind, ``required_file`` must be in an older artifact there.

    Raises:
        UserError: The output is a link, a file, a directory of other content, or another kind of artifact.
    """
    target = Path(path)
    if target.is_symlink():
        raise UserError(f"{target}: the output must be a directory, not a symbolic link.")
    restore_previous(target)
    if not target.name:
        raise UserError(f"{path!r}: the output has no directory name. Choose another output.")
    if target.exists() and not (target / CARD_NAME).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an artifact. Choose another output or remove it.")
    _reject_other_kind(target, kind, required_file)


def find_up_to_date(
    path: Path | str, kind: Kind, config: Mapping[str, Any], parents: list[Parent], required_file: str = ""
) -> Artifact | None:
    """Return the undamaged artifact at ``path`` if it has these parents and this configuration, else None.

    Paths of inputs that a checksum identifies may differ, except in a report, which names them.

    Raises:
        UserError: The result could not be written to ``path`` (see :func:`check_output`), or a parent is there.
    """
    target = Path(path)
    if leftovers(target):
        with file_lock(lock_path(target)):
            remove_leftovers(target)
    artifact = None
    if (target / CARD_NAME).is_file():
        with suppress(CorruptArtifact):  # it is about to be made again
            artifact = load_artifact(path)
    if artifact is not None:
        card = artifact.card
        if (card.kind, card.parents) == (kind, parents) and _is_same_config(card.config, config, parents, kind):
            return artifact
        if roles := [parent.role for parent in parents if parent.sha256 == artifact.sha256]:
            raise UserError(f"{target}: the output is also the input '{roles[0]}'. Choose another output.")
    check_output(path, kind, required_file)
    return None


def find_changes(path: Path | str, kind: Kind, config: Mapping[str, Any], parents: list[Parent]) -> str:
    """Return which keys of the configuration, or that the parents, differ from those of the artifact at ``path``.

    The text is empty if there is no artifact of this kind, or nothing differs.
    """
    try:
        card = json.loads(read_card_file(Path(path) / CARD_NAME))
        old_parents = [Parent.model_validate(parent) for parent in card["parents"]]
        if card["kind"] != kind:
            return ""
        old, new = identity(card["config"], old_parents), identity(config, parents)
    except (CorruptArtifact, OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    keys = _differing_keys(old, new)
    keys = [key for key in keys if key.split(".")[0] not in _DERIVED] or keys
    if len(keys) > _MAX_KEYS:
        keys = [*keys[:_MAX_KEYS], f"{len(keys) - _MAX_KEYS} more keys"]
    if not keys and old_parents != parents:
        keys = ["its inputs"]
    return ", ".join(keys)


def _differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in dict.fromkeys([*new, *old]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            keys += _differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            keys.append(f"{prefix}{key}")
    return keys


def config_to_json(config: Any) -> dict[str, Any]:
    """Return a configuration dataclass as JSON values without ``output``: a moved artifact is the same artifact."""
    values = json.loads(json.dumps(config_values(config), default=str))
    values.pop("output", None)
    return values


def _is_same_config(old: Mapping[str, Any], new: Mapping[str, Any], parents: list[Parent], kind: Kind) -> bool:
    if kind == "report":
        return old == json.loads(json.dumps(dict(new)))
    return identity(old, parents) == identity(new, parents)


def _reject_other_kind(target: Path, kind: Kind, required_file: str) -> None:
    """Raise if the output holds an input or another command's result, named by mistake."""
    try:
        card = json.loads(read_card_file(target / CARD_NAME))
        old_kind, files = card["kind"], list(card.get("files", ()))
    except (CorruptArtifact, OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if old_kind != kind:
        problem = f"an artifact of kind {old_kind}, expected {kind}"
    elif required_file and required_file not in files:
        problem = f"a {kind} of another command (without {required_file})"
    else:
        return
    raise UserError(f"{target}: the output holds {problem}. Choose another output.")


def _write_card(writer: ArtifactWriter) -> None:
    files = {}
    for path in sorted(writer.path.rglob("*")):
        name = path.relative_to(writer.path).as_posix()
        if path.is_file() and name.split("/")[0] not in writer.unlisted:
            sync(path)
            files[name] = FileEntry(size=path.stat().st_size, sha256=file_sha256(path))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    values = {key: value for key, value in vars(writer).items() if key not in ("path", "unlisted")}
    values["licences"] = combine_licences(writer.licences, writer.parents)
    values |= {"created": created, "code_version": __version__, "environment": environment(), "files": files}
    card = Card(schema=SCHEMA, **values)
    path = writer.path / CARD_NAME
    path.write_text(card.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")
    sync(path)
    for folder in {path.parent for path in (path, *(writer.path / name for name in files))}:
        sync(folder)
    writer.path.chmod(0o755)
