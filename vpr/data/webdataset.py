"""WebDataset shards: what a tar file holds, read from its headers alone.

Nothing is unpacked. An image in a shard has a name of its own, ``SHARD.tar#OFFSET+SIZE/MEMBER``, by which
:func:`vpr.imaging.decode.read_image` reads its bytes where they lie; every verb takes it like any other file. Python's
tarfile parses the headers. The ``webdataset`` package does not fit: its pipelines read a shard from its beginning,
where images are wanted in any order (training) or from any row on (a run that goes on), and it has no limits.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vpr.common.errors import UserError
from vpr.imaging.limits import MAX_FILE_BYTES

LABELS = (".json", ".cls")
_MAX_LABEL = 1 << 20
_MAX_NAME = 1024
_MAX_HEADER = 1 << 20  # bytes of an extended header, which tarfile holds in memory
_END = bytes(tarfile.BLOCKSIZE)


@dataclass
class Sample:
    """Members that follow each other and whose names agree up to the first dot, as WebDataset groups them.

    Attributes:
        key: what the names agree in; begins with a slash where the members lie in no folder.
        images: of each, ``#OFFSET+SIZE/MEMBER``, to be appended to the shard's name.
        labels: bytes of each label, by suffix.
        refused: name and reason of members that are not used.
    """

    key: str
    images: list[str] = field(default_factory=list)
    labels: dict[str, bytes] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)


def read_samples(shard: Path, suffixes: frozenset[str]) -> Iterator[Sample]:
    """The samples of a shard, in the order of its members.

    Links, devices and members whose names are absolute or hold ``..`` are refused, also those that are larger than
    an image may be; folders are passed over.

    Args:
        shard: an uncompressed tar file.
        suffixes: of images, in lower case.

    Raises:
        UserError: a broken or truncated tar.
    """
    sample = Sample("")
    with shard.open("rb") as stream:
        for member in _members(shard, stream):
            name = PurePosixPath(member.name).as_posix()
            key, suffix = _split(name)
            if key != sample.key:
                yield sample
                sample = Sample(key)
            if reason := _reason(member, suffix, suffixes):
                sample.refused.append((_shown(name), reason))
            elif suffix in sample.labels:
                sample.refused.append((_shown(name), "a second label of its sample"))
            elif suffix in LABELS:
                sample.labels[suffix] = os.pread(stream.fileno(), member.size, member.offset_data)
            else:
                # Padded, so that names sort like the members.
                sample.images.append(f"#{member.offset_data:012d}+{member.size}/{name}")
    yield sample


def read_label(sample: Sample, where: str) -> dict[str, Any]:
    """What a sample's ``.json`` says of its images, or its ``.cls``, which is the product; nothing without either.

    Args:
        sample: with its labels.
        where: shard and sample, for errors.

    Returns:
        ``product``, ``category``, ``role`` and ``split`` as text, ``box`` as a list: those that are given.

    Raises:
        UserError: no JSON object, or a value of another kind.
    """
    if ".json" not in sample.labels:
        return {"product": _text(sample.labels[".cls"].decode(errors="replace"), where)} if sample.labels else {}
    try:
        values = json.loads(sample.labels[".json"])
        given = [name for name in ("product", "category", "role", "split") if name in values]
        label = {name: _text(values[name], where) for name in given}
        return {**label, "box": list(values["box"])} if values.get("box") else label
    except (ValueError, TypeError, AttributeError, RecursionError):
        reason = "is no object with text values, and a box of four numbers"
        raise UserError(f"{where}: its .json {reason}: write the shard again") from None


def _text(value: object, where: str) -> str:
    text = str(value).strip() if type(value) in (str, int) else ""
    if not text.isprintable() or not text:
        raise UserError(f"{where}: label {value!r:.80} is no text or number: write the shard again")
    return text


def _members(shard: Path, stream: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Headers of a tar file but for its folders'; each lies behind the one before, and the last before the end mark."""
    try:
        bounded: Any = _Bounded(stream)
        with tarfile.open(fileobj=bounded, mode="r:", errors="surrogateescape") as tar:
            end = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them
                if member.size < 0 or tar.offset <= end:
                    raise ValueError("a member of negative size")
                end = tar.offset
                if not member.isdir():
                    yield member
            # tarfile takes a header that it cannot read for the end.
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != _END:
                raise ValueError("no end mark behind its last member")
    except UserError:
        raise
    except Exception as error:  # tarfile raises whatever a broken header makes of its parsers
        raise UserError(f"{shard}: truncated or broken tar ({error}): copy or write the shard again") from None


class _Bounded:
    """A file of which no more is read at a time than a header may need.

    Args:
        stream: the tar file.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.seek, self.tell = stream.seek, stream.tell
        self._read = stream.read

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes."""
        if not 0 <= size <= _MAX_HEADER:
            raise ValueError(f"a header of {size} bytes")
        return self._read(size)


def _reason(member: tarfile.TarInfo, suffix: str, suffixes: frozenset[str]) -> str:
    """Why a member is not used; empty if it is."""
    name = member.name
    if not member.isreg() or member.issparse():
        return "a link" if member.islnk() or member.issym() else "not a plain file"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "its name leads out of the shard"
    if not name.isprintable() or len(name) > _MAX_NAME:
        return f"its name has letters that cannot be printed, or more than {_MAX_NAME}"
    if PurePosixPath(name).name.startswith("."):
        return "its name begins with a dot"
    if suffix not in LABELS and os.path.splitext(name)[1].lower() not in suffixes:
        return "unknown suffix"
    most = _MAX_LABEL if suffix in LABELS else MAX_FILE_BYTES
    return f"{member.size} bytes, more than {most}" if member.size > most else ""


def _split(name: str) -> tuple[str, str]:
    """A name's part up to the first dot of its file, and the rest, as WebDataset cuts it."""
    folder, _, file = name.rpartition("/")
    stem, _, rest = file.partition(".")
    return f"{folder}/{stem}", f".{rest}"


def _shown(name: str) -> str:
    return (name if name.isprintable() else ascii(name)[1:-1])[:_MAX_NAME]
