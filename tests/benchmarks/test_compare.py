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


@pytest.fixture
def before(measured: dict[str, Any], tmp_path: Path) -> str:
    for row in measured["rows"]:
        if row["latency_ms"]:
            row["latency_ms"] = {"1": {"p50": 2.0, "p90": 2.5, "p99": 3.0}}
    return _write(tmp_path / "before.json", measured)


@pytest.fixture
def worse(before: str, measured: dict[str, Any], tmp_path: Path) -> str:
    """The INT8 graph on OpenVINO answers all queries wrong, takes 1.2 times as long and has twice the bytes."""
    row = measured["rows"][-1]
    row["hits"] = "0" * len(row["hits"])
    row["latency_ms"]["1"]["p50"] = 2.4
    row["size_bytes"] *= 2
    return _write(tmp_path / "worse.json", measured)


def _int8(config: CompareConfig) -> Any:
    return next(one for one in compare_reports(config) if one.name == "int8 on openvino")


def test_a_report_has_not_changed_from_itself(before: str) -> None:
    changes = compare_reports(CompareConfig(before, before, max_recall_drop=0, max_latency_ratio=1, max_size_ratio=1))
    assert len(changes) == 7
    assert not any(one.recall_beyond_noise or one.apart or one.drop for one in changes)


def test_what_got_worse_is_told_and_is_beyond_noise(
    before: str, worse: str, measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    old = json.loads(Path(before).read_text(encoding="utf-8"))["rows"][-1]
    change = _int8(CompareConfig(before, worse))
    assert change.drop == pytest.approx(old["hits"].count("1") / 32)
    assert change.recall_beyond_noise
    assert change.interval[0] < change.drop < change.interval[1]
    assert (change.ratios, change.apart, change.size) == ({"1": pytest.approx(1.2)}, ("1",), 2.0)
    printed = capsys.readouterr()
    assert "x 1.200 *" in printed.out
    assert "7 models on 32 queries, 1 changed beyond noise" in printed.err


def test_latency_is_beyond_noise_by_the_stated_bound_and_the_intervals(
    before: str, measured: dict[str, Any], tmp_path: Path
) -> None:
    def apart(noise: float, before_ends: list[float] | None, after_ends: list[float] | None) -> bool:
        old = json.loads(Path(before).read_text(encoding="utf-8"))
        for one, ends in ((old, before_ends), (measured, after_ends)):
            one["rows"][-1]["latency_ms"]["1"]["ci95"] = {"p50": ends} if ends else {}
        measured["rows"][-1]["latency_ms"]["1"]["p50"] = 2.09  # 1.045 times
        paths = _write(tmp_path / "a.json", old), _write(tmp_path / "b.json", measured)
        return bool(_int8(CompareConfig(*paths, latency_noise=noise)).apart)

    assert not apart(0.05, None, None)
    assert apart(0.04, None, None)
    assert apart(0.04, [1.98, 2.02], [2.05, 2.12])
    assert not apart(0.04, [1.98, 2.06], [2.05, 2.12])


def test_budgets_break_with_exit_code_1(before: str, worse: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, said in (
        (("--max-recall-drop", "0.01"), "int8 on openvino: recall@1 drops by"),
        (("--max-latency-ratio", "1.1"), "int8 on openvino: p50 at batch 1 is 1.200 times that before, allowed 1.1"),
        (("--max-size-ratio", "1.5"), "int8 on openvino: 2.000 times the bytes before, allowed 1.5"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["bench", "compare", before, worse, *flag])
        assert left.value.code == 1
        assert said in capsys.readouterr().err
    main(["bench", "compare", before, worse])
    main(["bench", "compare", worse, before, "--max-recall-drop", "0.01", "--max-latency-ratio", "1.1"])


def test_a_model_or_a_latency_that_is_gone_breaks_a_budget(
    before: str, measured: dict[str, Any], tmp_path: Path
) -> None:
    measured["rows"][-1]["latency_ms"] = None
    untimed = _write(tmp_path / "untimed.json", measured)
    with pytest.raises(BudgetExceeded, match="int8 on openvino: p50 at batch 1 measured before, not now"):
        compare_reports(CompareConfig(before, untimed, max_latency_ratio=1.5))
    del measured["rows"][-1]
    gone = _write(tmp_path / "gone.json", measured)
    with pytest.raises(BudgetExceeded, match="int8 on openvino: measured before, not now"):
        compare_reports(CompareConfig(before, gone, max_recall_drop=0.5))
    assert len(compare_reports(CompareConfig(before, gone))) == 6


def test_what_cannot_be_compared_ends_with_exit_code_2(
    before: str, measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured["environment"]["cpu"]["model"] = "another"
    other = _write(tmp_path / "other.json", measured)
    compare_reports(CompareConfig(before, other, max_recall_drop=0))
    assert "latencies are not comparable: other processors" in capsys.readouterr().err
    with pytest.raises(UserError, match="measure both on one machine"):
        compare_reports(CompareConfig(before, other, max_latency_ratio=1.1))
    measured["rows"].append(measured["rows"][-1])
    with pytest.raises(UserError, match="two rows are named 'int8 on openvino'"):
        compare_reports(CompareConfig(before, _write(tmp_path / "twice.json", measured)))
    measured["catalog"]["sha256"] = "0"
    with pytest.raises(UserError, match="other catalogues or splits"):
        compare_reports(CompareConfig(before, _write(tmp_path / "catalog.json", measured)))
    for arguments, said in (
        ((before, "absent.json"), "absent.json: no report here"),
        ((before,), "after"),
        ((before, before, "--max-recall-drop", "5"), "max_recall_drop: 5"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["bench", "compare", *arguments])
        assert left.value.code == 2
        assert said in capsys.readouterr().err
