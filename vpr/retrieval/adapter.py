"""Adapters from the embeddings of one model to those of another, fitted on images that both have embedded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes, solve

from vpr.retrieval.embeddings import l2_normalize

Vectors = NDArray[np.float32]
Method = Literal["procrustes", "linear"]
METHODS: tuple[Method, ...] = get_args(Method)
_MIN_ENERGY = 1e-9  # of a dimension, where all images have the same vector


@dataclass(frozen=True)
class Adapter:
    """An affine map from (old,) to (new,) dimensions, scaled to length 1.

    Attributes:
        weight: (old, new) float32.
        bias: (new,) float32.
    """

    weight: Vectors
    bias: Vectors

    def apply(self, vectors: Vectors) -> Vectors:
        """Return (n, new) float32 vectors of unit length for (n, old) unit vectors.

        Raises:
            UserError: A result is zero or not finite.
        """
        return l2_normalize(self._map(vectors))

    def lengths(self, vectors: Vectors) -> Vectors:
        """Return the (n,) float32 lengths before they are scaled to 1.

        A least-squares map estimates the expected new vector of an image. That of unit vectors is the shorter, the more
        they vary, so the expected squared error of the direction is about 2 - 2 * length.
        """
        lengths: Vectors = np.linalg.norm(self._map(vectors), axis=1)
        return lengths

    def _map(self, vectors: Vectors) -> Vectors:
        mapped: Vectors = vectors @ self.weight + self.bias
        return mapped


def fit_procrustes(old: Vectors, new: Vectors) -> Adapter:
    """Fit the orthogonal map from (n, old) to (n, new) unit vectors of the same images; it keeps cosines.

    Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966. The narrower vectors
    are padded with zeros. To more dimensions, the rows of the result are orthonormal; to fewer, its columns are.
    """
    dim = max(old.shape[1], new.shape[1])
    rotation, _ = orthogonal_procrustes(*(_pad(vectors, dim) for vectors in (old, new)))
    weight = rotation[: old.shape[1], : new.shape[1]].astype(np.float32)
    return Adapter(np.ascontiguousarray(weight), np.zeros(new.shape[1], np.float32))


def fit_linear(old: Vectors, new: Vectors, ridge: float) -> Adapter:
    """Fit the affine map from (n, old) to (n, new) vectors with the least squared error, by ridge regression.

    Args:
        old: Vectors of the old model.
        new: Vectors of the new model of the same images.
        ridge: Penalty of the squared weights, more than 0, as a multiple of the mean energy of an old dimension.
    """
    x, y = old.astype(np.float64), new.astype(np.float64)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean_x, y - mean_y
    moment = x.T @ x
    energy = max(float(np.trace(moment)) / len(moment), _MIN_ENERGY)
    weight = solve(moment + ridge * energy * np.eye(len(moment)), x.T @ y, assume_a="pos")
    # Row by row, since SciPy may return columns, which safetensors 0.8 stores in a wrong order (safetensors#825).
    return Adapter(np.ascontiguousarray(weight, dtype=np.float32), (mean_y - mean_x @ weight).astype(np.float32))


def _pad(vectors: Vectors, dim: int) -> NDArray[np.float64]:
    padded = np.zeros((len(vectors), dim))
    padded[:, : vectors.shape[1]] = vectors
    return padded
