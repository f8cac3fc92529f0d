"""Real images from file to model input, one per call, to time decoding and resizing."""

from collections.abc import Callable
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.pixels import read_pixels
from vpr.imaging.preprocess import Preprocess

_IMAGES = 64


def make_image_reader(catalog: Catalog, preprocess: Preprocess) -> Callable[[], NDArray[np.float32]]:
    """Return a function that reads the next of 64 images: (1, 3, size, size) float32, normalised.

    The images are spread over the catalogue and repeat after the last one; from then on the system caches their files.
    """
    if not len(catalog):
        raise UserError("catalog: the catalogue has no images. Pass another catalogue, or none.")
    rows = cycle(np.linspace(0, len(catalog) - 1, min(_IMAGES, len(catalog))).astype(int).tolist())

    def read() -> NDArray[np.float32]:
        row = next(rows)
        return preprocess.normalise(read_pixels(catalog, preprocess, range(row, row + 1)))

    return read
