"""Differences between the embeddings, and the rankings, of two models."""

import numpy as np
from numpy.typing import NDArray


def parity(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> dict[str, float]:
    """Compare (n, dim) float32 embeddings of the same images.

    The result has ``cosine_mean`` and ``cosine_min`` over images, and ``max_abs`` over all values. An image with a
    vector that is not finite counts as cosine -1.
    """
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.nan_to_num((a * b).sum(axis=1) / lengths, nan=-1.0, posinf=-1.0, neginf=-1.0)
    difference = float(np.abs(a - b).max())
    max_abs = difference if np.isfinite(difference) else float("inf")
    return {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min()), "max_abs": max_abs}


def rank_changes(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> dict[str, float]:
    """Compare the rankings of the same gallery, from (queries, gallery) similarities.

    The result has ``first_changed``, the share of queries with another first result; ``overlap``, the mean share of the
    first ten that both rankings contain; and ``first_moved``, the mean number of ranks by which the first result moved.
    """
    before, after = (np.argsort(-scores, axis=1, kind="stable") for scores in (expected, actual))
    moved = (after == before[:, :1]).argmax(axis=1)
    changed = float((moved > 0).mean())
    overlap = mean_overlap(before[:, :10], after[:, :10])
    return {"first_changed": changed, "overlap": overlap, "first_moved": float(moved.mean())}


def mean_overlap(before: NDArray[np.int64], after: NDArray[np.int64]) -> float:
    """Return the mean share of (queries, k) results that both lists of a query contain."""
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(before, after, strict=True)]))
