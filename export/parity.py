"""Differences between the embeddings, and the rankings, of two models."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def parity(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> dict[str, float]:
    """Compare embeddings of the same images.

    Args:
        expected: (n, dim) float32 of the reference model.
        actual: (n, dim) float32 of the other model.

    Returns:
        ``cosine_mean`` and ``cosine_min`` over images, and ``max_abs`` over all values. An image with a vector that
        is not finite counts as cosine -1.
    """
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.nan_to_num((a * b).sum(axis=1) / lengths, nan=-1.0, posinf=-1.0, neginf=-1.0)
    max_abs = np.abs(a - b).max()
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "max_abs": float(max_abs) if np.isfinite(max_abs) else float("inf"),
    }


def rank_changes(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> dict[str, float]:
    """Compare the rankings of the same gallery.

    Args:
        expected: (queries, gallery) similarities of the reference model.
        actual: (queries, gallery) similarities of the other model.

    Returns:
        ``first_changed``: share of queries with another first result; ``overlap``: mean share of the first ten that
        both rankings contain; ``first_moved``: mean number of ranks by which the first result has moved.
    """
    before, after = (np.argsort(-scores, axis=1, kind="stable") for scores in (expected, actual))
    top = min(10, expected.shape[1])
    shared = [len(set(a) & set(b)) / top for a, b in zip(before[:, :top], after[:, :top], strict=True)]
    moved = (after == before[:, :1]).argmax(axis=1)
    return {
        "first_changed": float((moved > 0).mean()),
        "overlap": float(np.mean(shared)),
        "first_moved": float(moved.mean()),
    }
