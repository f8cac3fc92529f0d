from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import compare_reports
from benchmarks.config import CompareConfig
from vpr.cli import main
from vpr.common.errors import BudgetExceeded, UserError


def _write(path: Path, report: dict[str, Any]) -> str:
    path.write_text(json.dumps(report), encoding="utf-8")
    return str(path)


def _lose(report: dict[str, Any], row: int, count: int) -> None:
    """Make a row miss the first ``count`` products, and hit all others."""
    hits = report["rows"][row]["hits"]
    report["rows"][row]["hits"] = {name: "01"[number >= count] for number, name in enumerate(hits)}


@pytest.fixture
def before(report_values: dict[str, Any], tmp_path: Path) -> str:
    for row in report_values["rows"]:
        if row["latency_ms"]:
            row["latency_ms"] = {"1": {"p50": 2.0, "p90": 2.5, "p99": 3.0}}
    _lose(report_values, -1, 8)
    return _write(tmp_path / "before.json", report_values)


@pytest.fixture
def worse(before: str, report_values: dict[str, Any], tmp_path: Path) -> str:
    """Report in which INT8 on OpenVINO has no hits, with 1.2 times the latency and twice the bytes."""
    row = report_values["rows"][-1]
    row["hits"] = {product: "0" * len(digits) for product, digits in row["hits"].items()}
    row["latency_ms"]["1"]["p50"] = 2.4
    row["size_bytes"] *= 2
    return _write(tmp_path / "worse.json", report_values)


def _int8(config: CompareConfig) -> Any:
    return next(change for change in compare_reports(config) if change.name == "int8 on openvino")


def test_report_has_not_changed_from_itself(before: str) -> None:
    changes = compare_reports(CompareConfig(before, before, max_recall_drop=0, max_latency_ratio=1, max_size_ratio=1))
    assert len(changes) == 7
    assert not any(change.is_recall_significant or change.significant_batches or change.drop for change in changes)


def test_model_that_has_learned_from_the_scored_products_is_marked(
    before: str, report_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = "seen: 3 of 32 products in training"
    counts = {"products": 32, "images": 64, "seen_products": {"training": 3}, "seen_images": {}, "unknown": []}
    report_values["rows"][-1]["seen"] = {**counts, "learned": mark, "selected": ""}
    compare_reports(CompareConfig(before, _write(tmp_path / "after.json", report_values)))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "seen:" in line]
    assert len(warnings) == 1
    assert f"int8 on openvino (after): {mark}" in warnings[0]


def test_worse_model_is_marked_significant(
    before: str, worse: str, report_values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    old = json.loads(Path(before).read_text(encoding="utf-8"))["rows"][-1]
    change = _int8(CompareConfig(before, worse))
    assert change.drop == pytest.approx("".join(old["hits"].values()).count("1") / 32)
    assert change.is_recall_significant
    assert change.interval is not None
    assert change.interval[0] < change.drop < change.interval[1]
    assert (change.ratios, change.significant_batches, change.size) == ({"1": pytest.approx(1.2)}, ("1",), 2.0)
    printed = capsys.readouterr()
    assert "x 1.200 *" in printed.out
    assert "7 models on 32 queries of 32 products, 1 changed beyond noise" in printed.err
    assert "5 % error rate over 7 models, Holm's correction" in printed.err


def test_marks_are_corrected_for_the_number_of_models(
    before: str, report_values: dict[str, Any], tmp_path: Path
) -> None:
    """Six lost queries alone have p = 2 / 2^6 = .031; among seven models they are no change beyond noise."""
    for row in range(7):
        _lose(report_values, row, 0)
    old = _write(tmp_path / "old.json", report_values)
    _lose(report_values, 6, 6)
    change = _int8(CompareConfig(old, _write(tmp_path / "six.json", report_values)))
    assert change.p_value == pytest.approx(7 * 2 / 2**6, abs=0.03)
    assert not change.is_recall_significant
    report_values["rows"] = report_values["rows"][-1:]
    only = json.loads(Path(old).read_text(encoding="utf-8"))
    only["rows"] = only["rows"][-1:]
    paths = _write(tmp_path / "old1.json", only), _write(tmp_path / "six1.json", report_values)
    assert _int8(CompareConfig(*paths)).is_recall_significant


def test_unconfirmed_drop_within_the_budget_is_a_warning(
    before: str, report_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in range(7):
        _lose(report_values, row, 0)
    old = _write(tmp_path / "old.json", report_values)
    compare_reports(CompareConfig(old, old, max_recall_drop=0.01))
    # 32 products without a change: (1 - p)^32 = 0.05.
    assert "within the budget, but its 95 % upper bound is 0.0894" in capsys.readouterr().err


def test_hits_of_other_products_are_an_error(before: str, report_values: dict[str, Any], tmp_path: Path) -> None:
    hits = report_values["rows"][3]["hits"]
    hits["another product"] = hits.pop(next(iter(hits)))
    with pytest.raises(UserError, match="after: the hits are of other products or queries"):
        compare_reports(CompareConfig(before, _write(tmp_path / "other.json", report_values)))


def test_latency_significance_needs_noise_and_intervals(
    before: str, report_values: dict[str, Any], tmp_path: Path
) -> None:
    def is_significant(noise: float, before_ends: list[float] | None, after_ends: list[float] | None) -> bool:
        old = json.loads(Path(before).read_text(encoding="utf-8"))
        for report, ends in ((old, before_ends), (report_values, after_ends)):
            report["rows"][-1]["latency_ms"]["1"]["ci95"] = {"p50": ends} if ends else {}
        report_values["rows"][-1]["latency_ms"]["1"]["p50"] = 2.09  # 1.045 times
        paths = _write(tmp_path / "a.json", old), _write(tmp_path / "b.json", report_values)
        return bool(_int8(CompareConfig(*paths, latency_noise=noise)).significant_batches)

    assert not is_significant(0.05, None, None)
    assert is_significant(0.04, None, None)
    assert is_significant(0.04, [1.98, 2.02], [2.05, 2.12])
    assert not is_significant(0.04, [1.98, 2.06], [2.05, 2.12])


def test_exceeded_budget_exits_with_code_1(before: str, worse: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, message in (
        (("--max-recall-drop", "0.01"), "int8 on openvino: recall@1 drops by"),
        (("--max-latency-ratio", "1.1"), "int8 on openvino: p50 at batch 1 is 1.200 times the p50 before, budget 1.1"),
        (("--max-size-ratio", "1.5"), "int8 on openvino: 2.000 times the bytes before, budget 1.5"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["bench", "compare", before, worse, *flag])
        assert exit_info.value.code == 1
        assert message in capsys.readouterr().err
    main(["bench", "compare", before, worse])
    main(["bench", "compare", worse, before, "--max-recall-drop", "0.01", "--max-latency-ratio", "1.1"])


def test_missing_model_or_latency_exceeds_a_budget(before: str, report_values: dict[str, Any], tmp_path: Path) -> None:
    report_values["rows"][-1]["latency_ms"] = None
    untimed = _write(tmp_path / "untimed.json", report_values)
    with pytest.raises(BudgetExceeded, match="int8 on openvino: p50 at batch 1 is missing from the report after"):
        compare_reports(CompareConfig(before, untimed, max_latency_ratio=1.5))
    del report_values["rows"][-1]
    missing = _write(tmp_path / "missing.json", report_values)
    with pytest.raises(BudgetExceeded, match="int8 on openvino: missing from the report after"):
        compare_reports(CompareConfig(before, missing, max_recall_drop=0.5))
    assert len(compare_reports(CompareConfig(before, missing))) == 6


def test_incomparable_reports_exit_with_code_2(
    before: str, report_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_values["environment"]["cpu"]["model"] = "another"
    other = _write(tmp_path / "other.json", report_values)
    compare_reports(CompareConfig(before, other, max_recall_drop=0))
    assert "latencies are not comparable: different processors" in capsys.readouterr().err
    with pytest.raises(UserError, match="Measure both on one machine"):
        compare_reports(CompareConfig(before, other, max_latency_ratio=1.1))
    report_values["rows"].append(report_values["rows"][-1])
    with pytest.raises(UserError, match="two rows are named 'int8 on openvino'"):
        compare_reports(CompareConfig(before, _write(tmp_path / "twice.json", report_values)))
    report_values["catalog"]["sha256"] = "0"
    with pytest.raises(UserError, match="different catalogues or splits"):
        compare_reports(CompareConfig(before, _write(tmp_path / "catalog.json", report_values)))
    for arguments, message in (
        ((before, "absent.json"), "absent.json: found no report"),
        ((before,), "after"),
        ((before, before, "--max-recall-drop", "5"), "max_recall_drop: expected -1 to 1"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["bench", "compare", *arguments])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
