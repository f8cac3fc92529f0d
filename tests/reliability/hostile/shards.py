"""Hostile WebDataset shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from tests.reliability.hostile.images import encoded
from tests.reliability.hostile.inputs import OUTSIDE_PATHS, Data, Hostile, write, zip_file

_ROUTES = ("catalog webdataset",)
_NAMES = (*OUTSIDE_PATHS, "x" * 2000 + ".png", "new\nline.png", "not-utf8-\udcff.png", ".hidden.png")


def shards() -> Iterator[Hostile]:
    """Yield shards with a member that is no image, with an invalid label, and files that are no shards."""
    image = encoded(Image.new("RGB", (64, 64)), "PNG")
    good = (_member("good.png"), image)
    yield from _odd_members(good)
    for name, data in _labels().items():
        put = partial(_shard, [good, (_member("good.json"), data)])
        yield Hostile("shard", f"a label of {name}", "rejected", _ROUTES, put)
    for name, data in _other_files(image).items():
        yield Hostile("shard", f"{name}, named .tar", "rejected", _ROUTES, partial(write, "in/0.tar", data))
    yield Hostile("shard", "a gzip bomb", "rejected", _ROUTES, partial(write, "in/0.tar.gz", b"\x1f\x8b" + bytes(99)))


def _odd_members(good: tuple[tarfile.TarInfo, bytes]) -> Iterator[Hostile]:
    """Yield shards with a valid member, and one that leads out of the shard or is a link or device."""

    def set_aside(name: str, member: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> Hostile:
        put = partial(_shard, [good, (member, good[1] if member.isreg() else b"")], form=form)
        return Hostile("shard", name, "set aside", _ROUTES, put)

    for form, label in ((tarfile.PAX_FORMAT, "pax"), (tarfile.GNU_FORMAT, "GNU")):
        for path in _NAMES:
            yield set_aside(f"a member {path[:30]!r}, {label}", _member(path), form)
    for label, kind in (("symbolic", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
        for target in ("/etc/passwd", "../../../escaped.png", "good.png"):
            yield set_aside(f"a {label} link to {target}", _member("link.png", kind, target))
    for label, kind in (("pipe", tarfile.FIFOTYPE), ("device", tarfile.CHRTYPE), ("disk", tarfile.BLKTYPE)):
        yield set_aside(f"a {label}", _member("x.png", kind))


def _labels() -> dict[str, bytes]:
    return {
        "deep nesting": b"[" * 100_000,
        "a huge number": b'{"product": ' + b"9" * 5000 + b"}",
        "a box without end": b'{"product": "a", "box": [0, 0, 1e999, 1]}',
        "a box of a million": b'{"product": "a", "box": [' + b"1," * 100_000 + b"1]}",
        "a product that is a list": b'{"product": ["a"]}',
        "terminal control codes": b'{"product": "\\u001b[2J"}',
        "invalid UTF-8": b'{"product": "\xff"}',
    }


def _other_files(image: bytes) -> dict[str, Data | Callable[[], Data]]:
    """Return files with the name of a shard that are no shards."""
    extended = _header(tarfile.XHDTYPE, 12) + b"12 path=abc\n".ljust(512, b"\0")
    return {
        "a zip with a path outside": zip_file("../../escaped.png", image),
        "a zip of an absolute path": zip_file("/tmp/escaped.png", image),
        "a zip bomb": zip_file("x.png", bytes(64 << 20)),
        "HTML": b"<html>" * 500,
        "an empty file": b"",
        "a header of 2 GB": _header(tarfile.XHDTYPE, 2 << 30),
        "a long name of 2 GB": _header(tarfile.GNUTYPE_LONGNAME, 2 << 30),
        "a missing member of 8 GB": _header(tarfile.REGTYPE, (8 << 30) - 1),
        "extended headers without end": extended,
        "100,000 extended headers": lambda: extended * 100_000,
    }


def _shard(members: list[tuple[tarfile.TarInfo, bytes]], folder: Path, form: int = tarfile.PAX_FORMAT) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    write("in/0.tar", stream.getvalue(), folder)


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def _header(kind: bytes, size: int) -> bytes:
    info = _member("x.png", kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)
