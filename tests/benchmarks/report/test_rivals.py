from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.config import ReportConfig
from benchmarks.latency.measure import time_models
from benchmarks.report.build import build_report
from benchmarks.report.recommendation import build_verdict
from benchmarks.report.render import draw_html, draw_markdown
from benchmarks.report.rivals import compare_rivals
from benchmarks.report.schema import Report, read_report
from experiments.random_student import write_random_student
from tests.conftest import small_student


def _with_rival(values: dict[str, Any], right: int, milliseconds: float) -> Report:
    """Return a report whose student is right for 16 of 32 products, and a rival for the first ``right`` of them."""
    student = next(row for row in values["rows"] if row["stage"] == "student")
    products = sorted(student["hits"])
    for row in values["rows"]:  # the models agree, and the baselines find nothing
        found = 0 if row["stage"] == "baseline" else 16
        row["hits"] = {product: "01"[number < found] for number, product in enumerate(products)}
    latency = {"1": {"p50": milliseconds, "p90": milliseconds, "p99": milliseconds}}
    hits = {product: "01"[number < right] for number, product in enumerate(products)}
    rival = {"name": "untrained", "stage": "teacher", "rival": True, "reference": False, "recall_at_1": right / 32}
    values["rows"].append({**student, **rival, "hits": hits, "latency_ms": latency})
    student["latency_ms"] = {"1": {"p50": 2.0, "p90": 2.0, "p99": 2.0}}
    return Report.model_validate(values)


@pytest.mark.parametrize(
    ("right", "outcome", "warning"),
    [(2, "ahead", ""), (15, "no difference shown", "is not shown to pay"), (32, "worse", "did not pay")],
)
def test_student_is_compared_by_product(report_values: dict[str, Any], right: int, outcome: str, warning: str) -> None:
    report = _with_rival(report_values, right, milliseconds=1.0)
    (result,) = compare_rivals(report)
    assert result.outcome == outcome
    assert result.gain == pytest.approx((16 - right) / 32)
    assert result.interval is not None
    assert result.interval[0] < result.gain < result.interval[1]
    assert result.time_share == 2.0
    assert warning in result.warning
    assert bool(warning) == bool(result.warning)
    if warning:
        assert result.warning in build_verdict(report).caveats
        assert build_verdict(report).headline.startswith("Preliminary")
    assert "Was distilling worth it?" in draw_html(report)
    assert "at 2.00 times its p50" in draw_markdown(report)


def test_slower_rival_that_is_not_shown_to_be_worse_is_no_warning(report_values: dict[str, Any]) -> None:
    (result,) = compare_rivals(_with_rival(report_values, 15, milliseconds=8.0))
    assert result.time_share == 0.25
    assert not result.warning


def test_rival_is_scored_and_timed_and_is_neither_reference_nor_choice(
    student_artifact: Path, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rival_artifact = write_random_student(tmp_path / "direct", small_student("patch"))
    models, rivals = (str(student_artifact),), (str(rival_artifact),)
    config = ReportConfig(str(shop), models, str(tmp_path / "report"), rivals, seconds=0.02, drop=1.0)
    monkeypatch.setattr("benchmarks.report.build.time_models", partial(time_models, starts=0))
    report = read_report(build_report(config))
    (rival,) = [row for row in report.rows if row.rival]
    assert rival.name == "direct"
    assert rival.hits
    assert rival.latency_ms
    assert [row.name for row in report.rows if row.reference] == ["student"]
    assert len(compare_rivals(report)) == 1
    assert report.selection is None or rival.title not in [step.title for step in report.selection.sequence]


def test_reports_without_rivals_say_nothing_about_them(report_values: dict[str, Any]) -> None:
    assert compare_rivals(Report.model_validate(report_values)) == []
    assert "distilling" not in draw_markdown(Report.model_validate(report_values))
