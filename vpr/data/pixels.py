"""Preprocessed pixels of catalogue rows."""

import numpy as np
from numpy.typing import NDArray

from vpr.data.catalog import Catalog
from vpr.imaging.decode import decode
from vpr.imaging.preprocess import Preprocess


def read_pixels(catalog: Catalog, preprocess: Preprocess, rows: range) -> NDArray[np.uint8]:
    """Decode and resize rows of a catalogue to (len(rows), 3, size, size) uint8."""
    images = (decode(catalog.path(row), catalog.box(row), preprocess.size) for row in rows)
    return np.stack([preprocess.pixels(image) for image in images])
