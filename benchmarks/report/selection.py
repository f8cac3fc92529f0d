"""Choice of the model to recommend, on products that the report does not score."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.recommendation import DEPLOYABLE
from benchmarks.report.schema import Candidate, Row, Selection
from calibration.confirmation import Confirmation, confirm_sequence
from vpr.retrieval.drop_test import DropTest, change_correlation, drop_test, state_result
from vpr.retrieval.intervals import MIN_PRODUCTS

_COSINE_DIGITS = 6

Hits = NDArray[np.bool_]


def order_rows(rows: list[Row], batch: str) -> list[Row]:
    """Return the rows that may be recommended, from the nearest to the FP32 student to the fastest.

    Rows are sorted by their cosine to the student. A row that is no faster at ``batch`` than a nearer one is left out.
    """
    timed = [row for row in rows if row.stage in DEPLOYABLE and not row.rival]
    timed = [row for row in timed if row.milliseconds(batch) is not None]

    def nearness(row: Row) -> tuple[bool, float, float]:
        cosine = -1.0 if row.cosine_mean is None else round(row.cosine_mean, _COSINE_DIGITS)
        return not row.reference, -cosine, row.milliseconds(batch) or 0.0

    ordered: list[Row] = []
    for row in sorted(timed, key=nearness):
        if not ordered or (row.milliseconds(batch) or 0.0) < (ordered[-1].milliseconds(batch) or 0.0):
            ordered.append(row)
    return ordered


def select_row(
    rows: list[Row],
    hits: Mapping[str, Hits],
    products: NDArray[np.str_],
    split: str,
    max_drop: float,
    confidence: float,
) -> Selection:
    """Test rows in their order until one fails (:mod:`calibration.confirmation` gives the source).

    The reference's drop is 0 by definition. If no other row is confirmed, the fastest one with a measured drop within
    the limit is chosen and ``confirmed`` is False.

    Args:
        rows: Rows from :func:`order_rows`, the reference first.
        hits: (queries,) bool hits on the split by title of the row.
        products: (queries,) products of the split's queries.
        split: Name of the split.
        max_drop: Recall@1 that the chosen row may lose against the reference.
        confidence: Confidence of the test.
    """
    reference, count = rows[0], len(np.unique(products))
    certain = Candidate(title=reference.title, drop=0.0, upper_bound=0.0, p_value=None, confirmed=True)
    float_hits = hits[reference.title]
    measured = [change_correlation(float_hits, row_hits, products) for row_hits in hits.values()]
    correlation = max((value for value in measured if value is not None), default=None)

    def test(row: Row) -> DropTest:
        return drop_test(float_hits, hits[row.title], products, correlation)

    is_tested = count >= MIN_PRODUCTS and len(rows) > 1
    tested = confirm_sequence(rows[1:], test, max_drop, confidence) if is_tested else []
    confirmed = [step for step in tested if step.confirmed]
    if confirmed or len(rows) == 1:
        chosen, is_confirmed = (confirmed[-1].candidate if confirmed else reference), True
    else:
        within = [row for row in rows if float_hits.mean() - hits[row.title].mean() <= max_drop]
        chosen, is_confirmed = within[-1], within[-1] is reference
    if len(rows) == 1:
        reason = "no other model is faster than the FP32 student"
    elif not tested:
        reason = f"not tested: a test needs queries of {MIN_PRODUCTS} products, the {split} split has {count}"
    else:
        last = (confirmed or tested)[-1]
        reason = state_result(last.test, max_drop, confidence, last.upper_bound)
    return Selection(
        split=split,
        products=count,
        queries=len(products),
        confidence=confidence,
        sequence=[certain, *map(_to_candidate, tested)],
        chosen=chosen.title,
        confirmed=is_confirmed,
        reason=reason,
    )


def _to_candidate(step: Confirmation[Row]) -> Candidate:
    return Candidate(
        title=step.candidate.title,
        drop=step.test.drop,
        upper_bound=step.upper_bound,
        p_value=step.p_value,
        confirmed=step.confirmed,
    )
