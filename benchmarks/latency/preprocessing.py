"""Real images from file to model input, one per call, to time decoding and resizing."""

from collections.abc import Callable
from itertools import cycle

import numpy as np

from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.pixels import read_pixels
from vpr.imaging.preprocess import ModelInput, Preprocess

_IMAGES = 64


def make_image_reader(catalog: Catalog, preprocess: Preprocess) -> Callable[[], ModelInput]:
    """Return a function that reads the next of 64 images, as the input of a model: one image, normalised or uint8.

    The images are spread over the catalogue and repeat after the last one; from then on the system caches their files.
    """
    if not len(catalog):
        raise UserError("catalog: the catalogue has no images. Pass another catalogue, or none.")
    rows = cycle(np.linspace(0, len(catalog) - 1, min(_IMAGES, len(catalog))).astype(int).tolist())

    def read() -> ModelInput:
        row = next(rows)
        return preprocess.model_input(read_pixels(catalog, preprocess, range(row, row + 1)))

    return read
