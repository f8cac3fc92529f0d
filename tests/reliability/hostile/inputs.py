"""Input that attacks whoever reads it, laid into the folder of a case.

The folder is that of a case of :mod:`tests.reliability.hostile.worker`: ``in`` holds the good image ``0/0.png``, ``shop``
more of them, and beside them lie the artifacts of :mod:`tests.reliability.commands`.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Put = Callable[[Path], None]
Data = bytes | str
# Where a file that climbs out would lie; the run sees what is written anywhere around its folder.
CLIMBS = ("../escaped.png", "../../escaped.png", "a/../../escaped.png", "/tmp/escaped.png", "a/../../../escaped.png")


@dataclass(frozen=True)
class Hostile:
    """Input that attacks.

    Attributes:
        kind: of the attack, as the table of results groups them.
        name: what it does.
        expected: ``set aside`` is for members of a shard and files of a folder.
        roads: of :data:`tests.reliability.hostile.routes.ROADS` that it takes.
        put: lays it into a folder.
    """

    kind: str
    name: str
    expected: Literal["taken", "refused", "set aside"]
    roads: tuple[str, ...]
    put: Put


def write(name: str, data: Data | Callable[[], Data], folder: Path) -> None:
    """Lay a file into a folder. What is large is made only now: the process that reads it is to hold nothing else."""
    path = folder / name
    data = data() if callable(data) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


def zipped(name: str, data: bytes) -> bytes:
    """A zip of one file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return stream.getvalue()
