"""Hostile input, and functions that write it into the folder of a case.

It is the folder of :mod:`tests.reliability.hostile.worker`: ``in`` holds the valid image ``0/0.png``, ``shop`` more
images, next to the artifacts of :mod:`tests.reliability.cases`.
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
# Paths that lead out of the folder; the worker detects a file written anywhere around its output.
OUTSIDE_PATHS = (
    *("../escaped.png", "../../escaped.png", "a/../../escaped.png"),
    *("/tmp/escaped.png", "a/../../../escaped.png"),
)


@dataclass(frozen=True)
class Hostile:
    """Hostile input.

    Attributes:
        kind: Kind of the attack; the table of results has a row for each.
        name: Name of the attack.
        expected: Outcome; ``set aside`` is for members of a shard and files of a folder.
        routes: Names in :data:`tests.reliability.hostile.routes.ROUTES`.
        put: Function that writes the input into a folder.
    """

    kind: str
    name: str
    expected: Literal["accepted", "rejected", "set aside"]
    routes: tuple[str, ...]
    put: Put


def write(name: str, data: Data | Callable[[], Data], folder: Path) -> None:
    """Write a file into a folder; ``data`` that is a function creates large content only now."""
    path = folder / name
    data = data() if callable(data) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


def zip_file(name: str, data: bytes) -> bytes:
    """Return a ZIP archive of one file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return stream.getvalue()
