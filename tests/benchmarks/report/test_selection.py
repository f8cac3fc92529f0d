from __future__ import annotations

import numpy as np
import pytest

from benchmarks.config import ReportConfig
from benchmarks.report.schema import Latency, Row
from benchmarks.report.selection import order_rows, select_row
from vpr.common.errors import UserError

PRODUCTS = np.arange(400).astype(str)
ALL = np.ones(400, dtype=bool)


def _row(name: str, cosine: float | None, p50: float | None, stage: str = "onnx") -> Row:
    row = Row.empty(name, stage, None, "fp32")
    row.reference, row.cosine_mean = name == "student", cosine
    row.latency_ms = None if p50 is None else {"1": Latency(p50=p50, p90=p50, p99=p50)}
    return row


def _losing(count: int) -> np.ndarray:
    return np.arange(400) >= count


def test_rows_are_ordered_from_nearest_to_fastest() -> None:
    rows = [
        _row("tiny", None, 1.0, "student"),
        _row("int8", 0.99, 2.0),
        _row("fp32", 0.9999999, 4.0),
        _row("fp32-slow", 1.0, 4.5),
        _row("fp16", 0.99999, 4.2),
        _row("teacher", 0.8, 0.5, "teacher"),
        _row("engine", 0.99, None, "engine"),
        _row("student", 1.0, 5.0, "student"),
    ]
    assert [row.name for row in order_rows(rows, "1")] == ["student", "fp32", "int8", "tiny"]


def test_last_row_before_a_failure_is_chosen() -> None:
    rows = [_row("student", 1.0, 5.0), _row("fp16", 0.9, 3.0), _row("int8", 0.8, 2.0), _row("tiny", 0.1, 1.0)]
    hits = {"student": ALL, "fp16": ALL, "int8": _losing(40), "tiny": ALL}
    selection = select_row(rows, hits, PRODUCTS, "validation", 0.02, 0.95)
    assert (selection.chosen, selection.confirmed, selection.products) == ("fp16", True, 400)
    assert [candidate.confirmed for candidate in selection.sequence] == [True, True, False]
    assert selection.reason.startswith("confirmed: drop at most 0.02 with 95 % confidence (upper bound 0.0102")


def test_unconfirmed_choice_is_the_fastest_with_a_measured_drop_within_the_limit() -> None:
    rows = [_row("student", 1.0, 5.0), _row("fp16", 0.9, 3.0), _row("int8", 0.8, 2.0)]
    hits = {"student": ALL, "fp16": _losing(1), "int8": _losing(8)}
    selection = select_row(rows, hits, PRODUCTS, "validation", 0.005, 0.95)
    assert (selection.chosen, selection.confirmed) == ("fp16", False)
    assert "not confirmable with 95 % confidence with these 400 products" in selection.reason


def test_few_products_are_not_tested() -> None:
    rows = [_row("student", 1.0, 5.0), _row("fp16", 0.9, 3.0)]
    selection = select_row(rows, {"student": ALL[:9], "fp16": ALL[:9]}, PRODUCTS[:9], "validation", 0.02, 0.95)
    assert (selection.chosen, selection.confirmed) == ("fp16", False)
    assert "needs queries of 10 products, the validation split has 9" in selection.reason


def test_reference_alone_is_certain() -> None:
    selection = select_row([_row("student", 1.0, 5.0)], {"student": ALL}, PRODUCTS, "validation", 0.0, 0.95)
    assert (selection.chosen, selection.confirmed) == ("student", True)
    assert selection.reason == "no other model is faster than the FP32 student"


def test_negative_drop_is_an_error() -> None:
    """The reference itself loses nothing, so no row could be chosen."""
    with pytest.raises(UserError, match=r"drop: expected 0 to 1, a share of queries such as 0\.005, got -0\.01"):
        ReportConfig("catalog", ("student",), "report", drop=-0.01)
