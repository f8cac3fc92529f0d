"""Cache of decoded and resized images in a file, which spares the decoding after the first epoch."""

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.imaging.preprocess import Preprocess

PATTERN = "pixels-*.cache"
_ENTRY = np.dtype("<u8")  # checksum of a row, 0 for a row that is not stored
_STORED = 1 << 32  # a stored row's checksum is never 0


class PixelCache:
    """Pixels of the first images of a data set, in a file that loader workers and processes share.

    An image is stored when it is first read. Its checksum is written after its pixels, so that no process takes an
    image that another one is writing, or that a killed one left incomplete.

    Args:
        path: File, which may exist from a killed training run.
        images: Number of images that it can hold, from the first on.
        side: Side of an image in pixels.

    Raises:
        UserError: The disk has no room for the file, which is reserved now.
    """

    def __init__(self, path: Path, images: int, side: int) -> None:
        self.path, self.images, self.side = path, images, side
        self._file: int | None = None
        try:
            os.posix_fallocate(self._open(), 0, images * bytes_per_image(side))
        except OSError as error:
            size = images * bytes_per_image(side) / 1e9
            self.close()
            path.unlink(missing_ok=True)
            raise UserError(
                f"loader.cache_gb: {path} cannot reserve {size:.1f} GB ({os.strerror(error.errno or 0)}). Lower it, or "
                "free some space."
            ) from None

    def read(self, row: int) -> NDArray[np.uint8] | None:
        """Return (3, side, side) uint8 pixels, or None if the row is not stored."""
        if row >= self.images:
            return None
        checksum = os.pread(self._open(), _ENTRY.itemsize, row * _ENTRY.itemsize)
        if not any(checksum):
            return None
        data = os.pread(self._open(), 3 * self.side**2, self._offset(row))
        if checksum != _checksum(data):
            return None
        return np.frombuffer(data, dtype=np.uint8).reshape(3, self.side, self.side)

    def write(self, row: int, pixels: NDArray[np.uint8]) -> None:
        """Store (3, side, side) uint8 pixels, if the cache can hold the row."""
        if row < self.images:
            data = pixels.tobytes()
            os.pwrite(self._open(), data, self._offset(row))
            os.pwrite(self._open(), _checksum(data), row * _ENTRY.itemsize)

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}  # each worker opens the file itself

    def __del__(self) -> None:
        self.close()

    def _open(self) -> int:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self._file

    def _offset(self, row: int) -> int:
        return self.images * _ENTRY.itemsize + row * 3 * self.side**2


@dataclass
class CacheSpace:
    """Disk space for the caches of a training run.

    Attributes:
        folder: Folder of the files.
        left: Bytes that no data set has taken yet.
    """

    folder: Path
    left: int

    def take(self, catalog: Catalog, preprocess: Preprocess, side: int) -> PixelCache | None:
        """Return the cache of a catalogue's images, or as many of them as there is space for; None without space."""
        images = min(len(catalog), self.left // bytes_per_image(side))
        if not images:
            return None
        self.left -= images * bytes_per_image(side)
        columns = [catalog.table[name].to_pylist() for name in ("image", "sha256", "box")]
        text = repr([columns, preprocess.model_dump_json(), side, images])
        name = PATTERN.replace("*", hashlib.sha256(text.encode()).hexdigest()[:16])
        return PixelCache(self.folder / name, images, side)

    def remove_others(self, used: set[Path]) -> None:
        """Remove the files of the folder that are not used, such as those of a stage with another image size."""
        for path in self.folder.glob(PATTERN):
            if path not in used:
                path.unlink(missing_ok=True)


def bytes_per_image(side: int) -> int:
    """Return the bytes of a stored image with its checksum."""
    return 3 * side**2 + _ENTRY.itemsize


def _checksum(data: bytes) -> bytes:
    return (zlib.crc32(data) | _STORED).to_bytes(_ENTRY.itemsize, "little")
