"""How far one model's embeddings lie from another's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def parity(expected: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, float]:
    """Compare embeddings of the same pictures.

    Args:
        expected: (n, dim) float32.
        found: (n, dim) float32.

    Returns:
        ``cosine_mean`` and ``cosine_min`` over pictures, ``max_abs`` over all values; a picture whose
        vector is not finite counts as cosine -1.
    """
    a, b = expected.astype(np.float64), found.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.nan_to_num((a * b).sum(axis=1) / lengths, nan=-1.0, posinf=-1.0, neginf=-1.0)
    largest = np.abs(a - b).max()
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "max_abs": float(largest) if np.isfinite(largest) else float("inf"),
    }
