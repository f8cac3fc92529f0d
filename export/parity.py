"""How far one model's embeddings lie from another's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def parity(expected: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, float]:
    """Compare embeddings of the same images.

    Args:
        expected: (n, dim) float32.
        found: (n, dim) float32.

    Returns:
        ``cosine_mean`` and ``cosine_min`` over images, ``max_abs`` over all values; an image whose
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


def rank_changes(expected: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, float]:
    """How the rankings of the same gallery differ.

    Args:
        expected: (queries, gallery) similarities.
        found: the same by another model.

    Returns:
        ``first_changed``: share of queries whose first result is another; ``overlap``: mean share of the first
        ten that both have; ``first_moved``: mean number of ranks by which the first result has moved.
    """
    before, after = (np.argsort(-scores, axis=1, kind="stable") for scores in (expected, found))
    top = min(10, expected.shape[1])
    shared = [len(set(a) & set(b)) / top for a, b in zip(before[:, :top], after[:, :top], strict=True)]
    moved = (after == before[:, :1]).argmax(axis=1)
    return {
        "first_changed": float((moved > 0).mean()),
        "overlap": float(np.mean(shared)),
        "first_moved": float(moved.mean()),
    }
