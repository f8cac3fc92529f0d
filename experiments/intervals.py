"""Texts of means and recalls with their 95 % intervals."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from vpr.retrieval.metrics import RetrievalScores, bootstrap_interval


def mean_text(values: NDArray[Any], form: str = ".3f") -> str:
    """Return the mean of (queries,) values with its bootstrap interval over the queries."""
    low, high = bootstrap_interval(values)
    return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"


def recall_text(scores: RetrievalScores) -> str:
    """Return recall@1 with its bootstrap interval over the queries."""
    low, high = scores.ci95
    return f"{scores.recall_at_1:.4f} [{low:.3f}, {high:.3f}]"


def drop_text(before: RetrievalScores, after: RetrievalScores) -> str:
    """Return the loss of recall@1 with the interval of the paired bootstrap; empty against itself."""
    return "" if before is after else mean_text(before.hits.astype(float) - after.hits, "+.4f")
