"""Hostile CSV tables, paths and links."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from tests.reliability.hostile.images import encoded
from tests.reliability.hostile.inputs import OUTSIDE_PATHS, Data, Hostile, write

_GIB = 1 << 30
_HEAD, _ROW = "image,product\n", "0/0.png,x\n"
_PATHS = (*OUTSIDE_PATHS, "..", ".", "../shop", "a\0b.png", "/etc/passwd", "/dev/zero", "/proc/self/mem", "x" * 5000)


def tables() -> Iterator[Hostile]:
    """Yield tables that are larger than memory, are no CSV, or have impossible values."""
    routes = ("catalog csv",)
    for name, start in (("in a cell", "0/0.png,"), ("quoted", '0/0.png,"'), ("in the first column", "")):
        yield Hostile(
            "CSV", f"a line of 1 GB {name}", "rejected", routes, partial(_write_sparse, (_HEAD + start).encode())
        )
    yield Hostile("CSV", "1 GB of heading", "rejected", routes, partial(_write_sparse, b"image,product,"))
    texts = _table_texts()
    for box in ("nan,0,1,1", "0,0,inf,1", "0,0,-1,1", "1e400,0,1,1", "0,0,0,0", "a,b,c,d", "0,0,1e300,1", "9,,,"):
        texts[f"box {box}"] = f"image,product,box_x,box_y,box_w,box_h\n0/0.png,a,{box}\n"
    for name, text in texts.items():
        yield Hostile("CSV", name, "rejected", routes, partial(write, "in/table.csv", text))


def _table_texts() -> dict[str, Data | Callable[[], Data]]:
    return {
        "60 MB of commas": lambda: _HEAD + "0/0.png,x" + "," * 60_000_000 + "\n",
        "5 million lines in a row": lambda: _HEAD + "0/0.png,x" + ',"\n"' * 5_000_000 + "\n",
        "400,000 columns": lambda: "image,product," + ",".join(f"c{n}" for n in range(400_000)) + "\n" + _ROW * 2000,
        "a quote without end": lambda: _HEAD + '0/0.png,"' + "a\n" * 3_000_000,
        "a line break in a product": _HEAD + '0/0.png,"a\nb"\n',
        "a line break in a path": _HEAD + '"0\n.png",b\n',
        "a return in a path": _HEAD + '"0\r.png",b\n',
        "a zero byte": _HEAD + "0\0/0.png,b\n",
        "Latin-1": _HEAD.encode() + b"0/0.png,caf\xe9\n",
        "UTF-16": _HEAD.encode("utf-16"),
        "broken UTF-8 in the heading": b"image,prod\xffuct\n0/0.png,a\n",
        "half a surrogate": _HEAD.encode() + b"0/0.png,\xed\xa0\x80\n",
        "overlong UTF-8": _HEAD.encode() + b"0/0.png,\xc0\xaf\n",
        "no heading": "0/0.png,a\n",
        "the same heading twice": "image,image\n0/0.png,a\n",
        "too few cells": _HEAD + "0/0.png\n",
        "too many cells": _HEAD + "0/0.png,a,b,c\n",
        "text after a quote": _HEAD + '"0/0.png"x,a\n',
        "an empty file": b"",
        "only blank lines": lambda: _HEAD + "\n" * 5_000_000,
        "an image": encoded(Image.new("RGB", (64, 64)), "PNG"),
        "an unknown role": "image,product,role\n0/0.png,a,admin\n",
        "an unknown split": "image,product,split\n0/0.png,a,../../x\n",
    }


def _write_sparse(head: bytes, folder: Path) -> None:
    """Write a sparse table of a gigabyte, which takes no disk space: zeros between its head and its end."""
    write("in/table.csv", head, folder)
    with (folder / "in" / "table.csv").open("ab") as stream:
        stream.seek(_GIB)
        stream.write(b"\n")


def paths() -> Iterator[Hostile]:
    """Yield tables of each reader that name a file elsewhere."""
    forms = {
        "csv": ("in/table.csv", "image,product\n{},a\n"),
        "products10k": ("in/train.csv", "name,class,group\n{},1,2\n"),
        "aicrowd": ("in/gallery.csv", "img_path,product_id\n{},1\n"),
    }
    for reader, (file, form) in forms.items():
        for path in _PATHS:
            if reader == "products10k" and not path.startswith("../../"):
                continue  # its images are a folder deeper, and their paths are always relative
            name = f"{path[:30]!r} in {reader}"
            put = partial(write, file, form.format(path))
            yield Hostile("path", name, "rejected", (f"catalog {reader}",), put)


def links() -> Iterator[Hostile]:
    """Yield folders with links or pipes as images."""
    routes = ("catalog folder", "catalog images")
    targets = ("/etc/passwd", "/dev/zero", "../../../originals/images/0/0.png", "/proc/self/environ")
    for target in targets:
        yield Hostile(
            "link", f"an image that is a link to {target}", "rejected", routes, partial(_put_link, target, "a/0.png")
        )
    for target, name in (("0.png", "a/0.png"), ("../a", "a/0.png"), ("nowhere.png", "a/0.png")):
        put = partial(_put_link, target, name)
        expected: Any = "rejected" if target == "0.png" else "set aside"
        yield Hostile("link", f"a link to {target}", expected, routes, put)
    yield Hostile("link", "a folder that is a link to /etc", "rejected", routes, partial(_put_link, "/etc", "b"))
    yield Hostile("link", "a pipe as an image", "set aside", routes, _put_pipe)


def _put_link(target: str, name: str, folder: Path) -> None:
    (folder / "in" / "a").mkdir(parents=True, exist_ok=True)
    (folder / "in" / name).symlink_to(target)


def _put_pipe(folder: Path) -> None:
    (folder / "in" / "a").mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "in" / "a" / "0.png")
