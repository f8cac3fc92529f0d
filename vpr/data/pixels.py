"""Preprocessed pixels of catalogue rows."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpr.data.catalog import Catalog
from vpr.imaging.decode import Box, decode
from vpr.imaging.preprocess import Preprocess


def read_pixels(catalog: Catalog, preprocess: Preprocess, rows: range, side: int | None = None) -> NDArray[np.uint8]:
    """Decode and resize rows of a catalogue to (len(rows), 3, side, side) uint8.

    ``side`` is that of the preprocessing if None. A larger one shows the same part of the image with more pixels. JPEGs
    are decoded at the scale that the preprocessing needs, so a larger side costs hardly more.
    """
    enlarged = preprocess if side in (None, preprocess.size) else preprocess.model_copy(update={"size": side})
    # Twice the shortest side is decoded, which is enough up to twice the size.
    images = (decode(catalog.path(row), catalog.box(row), preprocess.size) for row in rows)
    return np.stack([enlarged.pixels(image) for image in images])


class KeptPixels:
    """Pixels in memory, for several models that read the same images: one decoding for each preprocessing.

    Args:
        limit: Largest number of bytes that are kept. Images beyond it are decoded each time.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self._left = limit
        self._images: dict[tuple[Path, Box | None, Preprocess], NDArray[np.uint8]] = {}

    def read(self, catalog: Catalog, preprocess: Preprocess, rows: range) -> NDArray[np.uint8]:
        """Return what :func:`read_pixels` returns: (len(rows), 3, size, size) uint8."""
        return np.stack([self._read_row(catalog, preprocess, row) for row in rows])

    def _read_row(self, catalog: Catalog, preprocess: Preprocess, row: int) -> NDArray[np.uint8]:
        key = catalog.path(row), catalog.box(row), preprocess.float_input
        image = self._images.get(key)
        if image is None:
            image = read_pixels(catalog, preprocess, range(row, row + 1))[0]
            if image.nbytes <= self._left:
                self._images[key] = image
                self._left -= image.nbytes
        return image
