"""Real images from file to model input, one per call: what decoding and resizing cost beside the model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.pixels import read_pixels
from vpr.imaging.preprocess import Preprocess

_IMAGES = 64


def image_source(catalog: Catalog, preprocess: Preprocess) -> Callable[[], NDArray[np.float32]]:
    """A call that gives the next of 64 images, decoded, resized and normalised: (1, 3, size, size) float32.

    They are spread over the catalogue, and come again after the last; their files are in the system's cache then.
    """
    if not len(catalog):
        raise UserError("catalog: has no images: give another catalogue, or none")
    rows = cycle(np.linspace(0, len(catalog) - 1, min(_IMAGES, len(catalog))).astype(int).tolist())

    def read() -> NDArray[np.float32]:
        row = next(rows)
        return preprocess.normalise(read_pixels(catalog, preprocess, range(row, row + 1)))

    return read
