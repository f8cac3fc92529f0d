"""Preprocessed pixels of catalogue rows."""

import numpy as np
from numpy.typing import NDArray

from vpr.data.catalog import Catalog
from vpr.imaging.decode import decode
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
