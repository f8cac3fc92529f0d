"""WebDataset shards that attack whoever reads them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from tests.reliability.hostile.images import encoded
from tests.reliability.hostile.inputs import CLIMBS, Data, Hostile, write, zipped

_ROADS = ("catalog webdataset",)
_NAMES = (*CLIMBS, "x" * 2000 + ".png", "new\nline.png", "not-utf8-\udcff.png", ".hidden.png")


def shards() -> Iterator[Hostile]:
    """Shards with a member that is no image, with a label that is none, and files that are no shards."""
    image = encoded(Image.new("RGB", (64, 64)), "PNG")
    good = (_member("good.png"), image)
    yield from _odd_members(good)
    for name, data in _labels().items():
        put = partial(_shard, [good, (_member("good.json"), data)])
        yield Hostile("shard", f"a label of {name}", "refused", _ROADS, put)
    for name, whole in _other_files(image).items():
        yield Hostile("shard", f"{name}, named .tar", "refused", _ROADS, partial(write, "in/0.tar", whole))
    yield Hostile("shard", "a gzip bomb", "refused", _ROADS, partial(write, "in/0.tar.gz", b"\x1f\x8b" + bytes(99)))


def _odd_members(good: tuple[tarfile.TarInfo, bytes]) -> Iterator[Hostile]:
    """Members that lead out of the shard, are links or devices: each is set aside, beside a good one."""

    def aside(name: str, member: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> Hostile:
        put = partial(_shard, [good, (member, good[1] if member.isreg() else b"")], form=form)
        return Hostile("shard", name, "set aside", _ROADS, put)

    for form, said in ((tarfile.PAX_FORMAT, "pax"), (tarfile.GNU_FORMAT, "GNU")):
        for path in _NAMES:
            yield aside(f"a member {path[:30]!r}, {said}", _member(path), form)
    for said, kind in (("symbolic", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
        for target in ("/etc/passwd", "../../../escaped.png", "good.png"):
            yield aside(f"a {said} link to {target}", _member("link.png", kind, target))
    for said, kind in (("pipe", tarfile.FIFOTYPE), ("device", tarfile.CHRTYPE), ("disk", tarfile.BLKTYPE)):
        yield aside(f"a {said}", _member("x.png", kind))


def _labels() -> dict[str, bytes]:
    return {
        "deep nesting": b"[" * 100_000,
        "a huge number": b'{"product": ' + b"9" * 5000 + b"}",
        "a box without end": b'{"product": "a", "box": [0, 0, 1e999, 1]}',
        "a box of a million": b'{"product": "a", "box": [' + b"1," * 100_000 + b"1]}",
        "a product that is a list": b'{"product": ["a"]}',
        "text that steers the terminal": b'{"product": "\\u001b[2J"}',
        "no UTF-8": b'{"product": "\xff"}',
    }


def _other_files(image: bytes) -> dict[str, Data | Callable[[], Data]]:
    """What is named as a shard, and is none."""
    extended = _header(tarfile.XHDTYPE, 12) + b"12 path=abc\n".ljust(512, b"\0")
    return {
        "a zip that climbs out": zipped("../../escaped.png", image),
        "a zip of an absolute path": zipped("/tmp/escaped.png", image),
        "a zip bomb": zipped("x.png", bytes(64 << 20)),
        "HTML": b"<html>" * 500,
        "nothing": b"",
        "a header of 2 GB": _header(tarfile.XHDTYPE, 2 << 30),
        "a long name of 2 GB": _header(tarfile.GNUTYPE_LONGNAME, 2 << 30),
        "a member of 8 GB that is not there": _header(tarfile.REGTYPE, (8 << 30) - 1),
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
