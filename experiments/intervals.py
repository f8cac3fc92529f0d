"""Texts of means and recalls with their 95 % intervals by product."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from vpr.retrieval.intervals import Interval, intraclass_correlation, mean_interval, sum_by_product
from vpr.retrieval.metrics import RetrievalScores


def interval_text(interval: Interval | None, form: str = ".3f") -> str:
    """Return an interval in brackets; empty if there are too few products for one."""
    return f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""


def mean_text(values: NDArray[Any], products: NDArray[Any], form: str = ".3f") -> str:
    """Return the mean of (queries,) values with its interval over the queries' products."""
    return f"{values.mean():{form}}{interval_text(mean_interval(values, products), form)}"


def gain_text(
    differences: NDArray[Any], products: NDArray[Any], form: str = "+.4f", hits: NDArray[Any] | None = None
) -> str:
    """Return the mean of (queries,) differences of two models with its paired interval.

    Where few products change, changes are taken to correlate within products as the (queries,) ``hits`` of the first
    model do; None makes no assumption.
    """
    correlation = 1.0 if hits is None else intraclass_correlation(sum_by_product(hits, products))
    interval = mean_interval(differences, products, lowest=-1, correlation=correlation)
    return f"{differences.mean():{form}}{interval_text(interval, form)}"


def recall_text(scores: RetrievalScores) -> str:
    """Return recall@1 with its interval over the products."""
    return f"{scores.recall_at_1:.4f}{interval_text(scores.ci95)}"


def drop_text(before: RetrievalScores, after: RetrievalScores) -> str:
    """Return the loss of recall@1 with its paired interval; empty against itself."""
    return (
        "" if before is after else gain_text(before.hits.astype(float) - after.hits, before.products, hits=before.hits)
    )
