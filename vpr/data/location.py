"""Place of a catalogue's images, next to its card: it may change without changing the catalogue."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from vpr.artifacts.run_folder import atomic_write
from vpr.common.errors import UserError
from vpr.common.hardware import available_cpus
from vpr.imaging.decode import ImageRejected, read_image

FILE = "location.json"  # not listed in the card, whose checksum identifies the catalogue
SAMPLE = 256  # images whose checksums are compared before a place is accepted
_FEW = 4
_MAX_BYTES = 1 << 16


def write_location(folder: Path, root: Path, name: str = "") -> None:
    """Record the folder of the images, absolute and relative to the catalogue, so that both may move together.

    ``folder`` is the catalogue's, or a temporary one next to it that will get this ``name``.
    """
    place = folder.resolve().parent / name if name else folder.resolve()
    values = {"root": str(root.resolve()), "relative": os.path.relpath(root.resolve(), place)}
    with atomic_write(folder / FILE, "w") as stream:
        json.dump(values, stream, indent=1)


def find_root(folder: Path, recorded: Path, table: pa.Table) -> Path:
    """Return the folder of a catalogue's images.

    That is the recorded folder. If it does not exist, it is the folder at the same place relative to the catalogue,
    provided that some images there have the checksums of the catalogue.

    Args:
        folder: Folder of the catalogue.
        recorded: Folder of the images in the catalogue's card, for catalogues without a location.
        table: Rows of the catalogue.

    Raises:
        UserError: The location file is broken.
    """
    path = folder / FILE
    if not os.path.lexists(path):
        return recorded
    root, relative = _read(path)
    if root.is_dir() or not (folder / relative).is_dir():
        return root
    moved = (folder / relative).resolve()
    return root if differing_images(table, moved, _FEW) else moved


def differing_images(table: pa.Table, root: Path, count: int = SAMPLE) -> list[str]:
    """Return the images among ``count`` evenly spaced rows that are missing in a folder or have other contents."""
    rows = np.linspace(0, len(table) - 1, min(count, len(table))).astype(np.int64)
    sample = table.select(["image", "sha256"]).take(pa.array(rows))
    names, checksums = (sample[column].to_pylist() for column in ("image", "sha256"))

    def is_same(name: str, sha256: str | None) -> bool:
        try:
            return hashlib.sha256(read_image(root / name)).hexdigest() == sha256
        except ImageRejected:
            return False

    with ThreadPoolExecutor(len(available_cpus())) as pool:
        same = list(pool.map(is_same, names, checksums))
    return [name for name, kept in zip(names, same, strict=True) if not kept]


def _read(path: Path) -> tuple[Path, Path]:
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise ValueError("not a small plain file")
        values = json.loads(path.read_text(encoding="utf-8"))
        root, relative = values["root"], values["relative"]
        if not (isinstance(root, str) and isinstance(relative, str)) or "\0" in root + relative:
            raise ValueError("no paths")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        fix = "Remove it, or run `vpr catalog relocate`"
        raise UserError(f"{path}: it does not say where the images are. {fix}.") from None
    return Path(root), Path(relative)
