"""WebDataset shards: samples of a tar file, read from its headers.

Nothing is unpacked. ``SHARD.tar#OFFSET+SIZE/MEMBER`` names an image in a shard;
:func:`vpr.imaging.decode.read_image` reads its bytes from the shard, so every command accepts it like a file.
Python's tarfile parses the headers. The ``webdataset`` package is not used because it has no limits for untrusted
files, such as the size of a member or a header.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vpr.common.errors import UserError
from vpr.data.columns import rename_columns
from vpr.data.csv_table import MAX_COLUMNS
from vpr.data.tables import to_object
from vpr.imaging.limits import MAX_FILE_BYTES

LABELS = (".json", ".cls")
HIDDEN, UNKNOWN_SUFFIX = "its name starts with a dot", "unknown suffix"
_MAX_LABEL_BYTES = 1 << 20
_KEYS = ("product", "category", "role", "split", "box")
_MAX_NAME = 1024  # characters
_MAX_KEY = 100  # characters of a key that is reported
_MAX_HEADER_BYTES = 1 << 20  # of an extended header, which tarfile reads into memory
_END_MARK = bytes(tarfile.BLOCKSIZE)


@dataclass
class Sample:
    """Consecutive members with the same name up to the first dot, as WebDataset groups them.

    Attributes:
        key: Common part of the names; it starts with a slash if the members are in no folder.
        images: ``#OFFSET+SIZE/MEMBER`` of each image, to append to the shard's name.
        labels: Bytes of each label, by suffix.
        rejected: Name and reason of members that are not used.
    """

    key: str
    images: list[str] = field(default_factory=list)
    labels: dict[str, bytes] = field(default_factory=dict)
    rejected: list[tuple[str, str]] = field(default_factory=list)


def read_samples(shard: Path, suffixes: frozenset[str]) -> Iterator[Sample]:
    """Read the samples of an uncompressed shard, in the order of its members; ``suffixes`` of images are in lower case.

    Links, devices, too large members and members with absolute names or ``..`` are rejected; folders are skipped.
    Names that start with a dot, such as those of macOS, are rejected and end no sample.

    Raises:
        UserError: The tar file is broken or truncated, a sample has two different labels of one name, or the label of
            an image has dots in its name, so that it is no label.
    """
    sample = Sample("")
    with shard.open("rb") as stream:
        for member in _read_members(shard, stream):
            name = PurePosixPath(member.name).as_posix()
            key, suffix = _split_name(name)
            reason = _rejection_reason(member, suffix, suffixes)
            if key != sample.key and reason != HIDDEN:
                yield _check_names(shard, sample)
                sample = Sample(key)
            if reason:
                sample.rejected.append((_printable(name), reason))
            elif suffix in LABELS:
                label = os.pread(stream.fileno(), member.size, member.offset_data)
                if sample.labels.setdefault(suffix, label) != label:
                    problem = f"'{_printable(name)}' is there twice with different labels"
                    raise UserError(f"{shard}: {problem}. Write the shard again with another name for each sample.")
                if sample.labels[suffix] is not label:
                    sample.rejected.append((_printable(name), "a second label of its sample"))
            else:
                # Zero-padded, so that names sort like the members.
                sample.images.append(f"#{member.offset_data:012d}+{member.size}/{name}")
    yield _check_names(shard, sample)


def _check_names(shard: Path, sample: Sample) -> Sample:
    """Return a sample; raise :class:`UserError` if a label is named like an image and no label, for its other dots."""
    if not sample.labels and sample.images and sample.rejected:
        stems = {os.path.splitext(image.partition("/")[2])[0] for image in sample.images}
        for name, reason in sample.rejected:
            stem, suffix = os.path.splitext(name)
            if reason == UNKNOWN_SUFFIX and suffix.lower() in LABELS and stem in stems:
                problem = f"'{name}' is no label, because the name of a sample ends at its first dot"
                raise UserError(f"{shard}: {problem}. Write the shard again with names without other dots.")
    return sample


def read_label(sample: Sample, where: str) -> tuple[dict[str, Any], list[str]]:
    """Read the label of a sample from its ``.json``, or its product from ``.cls``; empty without a label.

    Returns those of ``product``, ``category``, ``role``, ``split`` (text) and ``box`` (list) that the label has, and
    the keys that are not read. Keys are found regardless of case and white space, as the columns of tables.

    Raises:
        UserError: The label is not a JSON object in UTF-8, a key is there twice, or a value has another type; it starts
            with ``where``.
    """
    if ".json" in sample.labels:
        return _read_json(sample.labels[".json"], where)
    try:
        return {"product": _text(sample.labels[".cls"].decode(), where)} if sample.labels else {}, []
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: its .cls is not text in UTF-8 ({error}). Rewrite the shard.") from None


def _read_json(data: bytes, where: str) -> tuple[dict[str, Any], list[str]]:
    try:
        found = json.loads(data, object_pairs_hook=to_object)
        if not isinstance(found, dict) or len(found) > MAX_COLUMNS:
            raise ValueError(f"expected at most {MAX_COLUMNS} keys")
        names = rename_columns(list(found), _KEYS, (), {}, where)
        values = dict(zip(names, found.values(), strict=True))
        filled = [name for name in ("category", "role", "split") if values.get(name) not in (None, "")]
        label = {name: _text(values[name], where) for name in (*(["product"] if "product" in values else []), *filled)}
        box = {"box": list(values["box"])} if values.get("box") else {}
        return {**label, **box}, [_shorten(name) for name in names if name not in _KEYS]
    except (ValueError, TypeError, RecursionError) as error:
        problem = "its .json is not an object with text values, and a box of four numbers"
        raise UserError(f"{where}: {problem} ({error}). Rewrite the shard.") from None


def _text(value: object, where: str) -> str:
    """Return a text or an integer as text; ``4.0`` is an integer, as writers of tables make of a missing value."""
    is_integer = type(value) is int or (isinstance(value, float) and value.is_integer())
    text = str(value).strip() if is_integer or isinstance(value, str) else ""
    if not text.isprintable() or not text:
        raise UserError(f"{where}: label {value!r:.80} is not text or an integer. Rewrite the shard.")
    return text


def _shorten(key: str) -> str:
    return (key if key.isprintable() else ascii(key)[1:-1])[:_MAX_KEY]


def _read_members(shard: Path, stream: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Read the headers of a tar file, except folders; check that they are in order and end with the end mark."""
    try:
        bounded: Any = _BoundedReader(stream)
        with tarfile.open(fileobj=bounded, mode="r:", errors="surrogateescape") as tar:
            end = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all headers
                if member.size < 0 or tar.offset <= end:
                    raise ValueError("a member of negative size")
                end = tar.offset
                if not member.isdir():
                    yield member
            # tarfile also stops at a header that it cannot parse.
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != _END_MARK:
                raise ValueError("no end mark after its last member")
    except UserError:
        raise
    except Exception as error:  # tarfile's parsers raise many types on broken headers
        raise UserError(f"{shard}: truncated or broken tar ({error}). Copy or write the shard again.") from None


class _BoundedReader:
    """File that rejects reads larger than any valid header."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.seek, self.tell = stream.seek, stream.tell
        self._read = stream.read

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes."""
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return self._read(size)


def _rejection_reason(member: tarfile.TarInfo, suffix: str, suffixes: frozenset[str]) -> str:
    """Return why a member is not used, or an empty string."""
    name = member.name
    if not member.isreg() or member.issparse():
        return "a link" if member.islnk() or member.issym() else "not a regular file"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "its name leads out of the shard"
    if not name.isprintable() or len(name) > _MAX_NAME:
        return f"its name has unprintable characters, or more than {_MAX_NAME}"
    if PurePosixPath(name).name.startswith("."):
        return HIDDEN
    if suffix not in LABELS and os.path.splitext(name)[1].lower() not in suffixes:
        return UNKNOWN_SUFFIX
    limit = _MAX_LABEL_BYTES if suffix in LABELS else MAX_FILE_BYTES
    return f"{member.size} bytes, more than {limit}" if member.size > limit else ""


def _split_name(name: str) -> tuple[str, str]:
    """Split a name at the first dot of its file name, as WebDataset does; the suffix is in lower case."""
    folder, _, file = name.rpartition("/")
    stem, _, rest = file.partition(".")
    return f"{folder}/{stem}", f".{rest.lower()}"


def _printable(name: str) -> str:
    return (name if name.isprintable() else ascii(name)[1:-1])[:_MAX_NAME]
