"""Choice of the model to recommend, on products that the report does not score."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.recommendation import DEPLOYABLE
from benchmarks.report.schema import Candidate, Row, Selection
from vpr.retrieval.drop_test import DropTest, change_correlation, drop_test, state_result
from vpr.retrieval.intervals import MIN_PRODUCTS

_COSINE_DIGITS = 6

Hits = NDArray[np.bool_]


def order_rows(rows: list[Row], batch: str) -> list[Row]:
    """Return the rows that may be recommended, from the nearest to the FP32 student to the fastest.

    Rows are sorted by their cosine to the student. A row that is no faster at ``batch`` than a nearer one is left out.
    """
    timed = [row for row in rows if row.stage in DEPLOYABLE and row.milliseconds(batch) is not None]

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
    sequence = [Candidate(title=reference.title, drop=0.0, upper_bound=0.0, p_value=None, confirmed=True)]
    float_hits, tests = hits[reference.title], list[DropTest]()
    measured = [change_correlation(float_hits, row_hits, products) for row_hits in hits.values()]
    correlation = max((value for value in measured if value is not None), default=None)
    level = 1 - (1 - confidence) / max(1, len(rows) - 1)  # the bounds hold for all rows together
    for row in rows[1:] if count >= MIN_PRODUCTS else ():
        tests.append(drop_test(float_hits, hits[row.title], products, correlation))
        p_value = tests[-1].p_value(max_drop)
        sequence.append(
            Candidate(
                title=row.title,
                drop=tests[-1].drop,
                upper_bound=tests[-1].upper_bound(level),
                p_value=p_value,
                confirmed=p_value <= 1 - confidence,
            )
        )
        if not sequence[-1].confirmed:
            break
    confirmed = [candidate.title for candidate in sequence if candidate.confirmed]
    chosen, is_confirmed = confirmed[-1], True
    if len(confirmed) > 1:
        last = tests[len(confirmed) - 2]
        reason = state_result(last, max_drop, confidence, last.upper_bound(level))
    elif len(rows) == 1:
        reason = "no other model is faster than the FP32 student"
    else:
        within = [row.title for row in rows if float_hits.mean() - hits[row.title].mean() <= max_drop]
        chosen, is_confirmed = within[-1], within[-1] == reference.title
        needed = f"not tested: a test needs queries of {MIN_PRODUCTS} products, the {split} split has {count}"
        reason = state_result(tests[0], max_drop, confidence, tests[0].upper_bound(level)) if tests else needed
    return Selection(
        split=split,
        products=count,
        queries=len(products),
        confidence=confidence,
        sequence=sequence,
        chosen=chosen,
        confirmed=is_confirmed,
        reason=reason,
    )
