"""Baselines without training: the floor that recalls are compared with."""

import numpy as np
from numpy.typing import NDArray

from vpr.data.catalog import Catalog
from vpr.data.pixels import read_pixels
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import l2_normalize

_BINS = 8
_BLOCK = 256
_PREPROCESS = Preprocess(size=64)


def raw_pixels(catalog: Catalog) -> NDArray[np.float32]:
    """Return images squashed to 64x64 RGB: (n, 12288) float32, L2-normalised."""
    blocks = [pixels.reshape(len(pixels), -1).astype(np.float32) for pixels in _blocks(catalog)]
    return l2_normalize(np.concatenate(blocks) + np.float32(1e-6))


def colour_histogram(catalog: Catalog) -> NDArray[np.float32]:
    """Return square roots of 8x8x8 RGB histograms, (n, 512) float32, whose cosine is the Bhattacharyya coefficient."""
    return l2_normalize(np.concatenate([np.stack([histogram(p) for p in pixels]) for pixels in _blocks(catalog)]))


def histogram(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return square roots of the colour counts: (3, height, width) uint8 to (512,) float32."""
    red, green, blue = (pixels // (256 // _BINS)).reshape(3, -1).astype(np.int64)
    counts = np.bincount((red * _BINS + green) * _BINS + blue, minlength=_BINS**3)
    return np.sqrt(counts).astype(np.float32)


def _blocks(catalog: Catalog) -> list[NDArray[np.uint8]]:
    starts = range(0, len(catalog), _BLOCK)
    return [read_pixels(catalog, _PREPROCESS, range(s, min(s + _BLOCK, len(catalog)))) for s in starts]
