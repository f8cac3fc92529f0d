from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.reliability.hostile.hostile import MAX_SECONDS, HostileConfig, HostileResult, attack, summarise
from tests.reliability.hostile.images import images
from tests.reliability.hostile.routes import ROUTES, run_vpr
from tests.reliability.hostile.worker import _file_states, cases
from tests.reliability.progress import Progress
from vpr.common.errors import UserError


@pytest.mark.reliability
def test_attacks_of_every_kind_are_harmless() -> None:
    """Each is rejected in one line, set aside with a reason or read correctly; time, memory and writes are checked."""
    results = attack(HostileConfig(every=41))
    assert [result for result in results if result.is_faulty] == []
    assert len({result.kind for result in results}) >= 12


@pytest.mark.reliability
def test_all_attacks_are_harmless() -> None:
    results = attack(HostileConfig())
    assert [result for result in results if result.is_faulty] == []
    assert {result.route for result in results} == set(ROUTES)


def test_six_hundred_inputs_are_distinct() -> None:
    assert len({(case.kind, case.name) for case in cases()}) >= 600
    assert len({(case.kind, case.name, case.route) for case in cases()}) == len(cases())
    small = [image for image in images() if not image.kind.startswith("bomb") and "50000000" not in image.name]
    assert len({hashlib.sha256(image.make()).digest() for image in small}) > 0.95 * len(small)


def test_finished_cases_are_not_run_again(tmp_path: Path) -> None:
    """No worker starts."""
    answer = {"outcome": "rejected", "line": "x: y.", "seconds": 0.1, "clock": 0.1, "memory": 1}
    for case in cases()[:3]:
        Progress(tmp_path / "hostile.jsonl").add(f"{case.kind}: {case.name}: {case.route}", answer)
    results = attack(HostileConfig(count=3), Progress(tmp_path / "hostile.jsonl"))
    assert [(result.case, result.line) for result in results] == [(0, "x: y."), (1, "x: y."), (2, "x: y.")]


def test_writes_around_the_output_are_detected(tmp_path: Path) -> None:
    (tmp_path / "case" / "out").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "settings").write_text("a")
    before = _file_states(tmp_path)
    (tmp_path / "case" / "out" / "result").write_text("x")
    assert _file_states(tmp_path) == before
    (tmp_path / "home" / "settings").write_text("b")
    (tmp_path / "escaped.png").write_text("")
    after = _file_states(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {"home/settings", "escaped.png"}


def test_error_line_becomes_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        run_vpr("catalog", "--reader", "folder", "--root", str(tmp_path / "absent"), "--output", str(tmp_path / "o"))
    with pytest.raises(UserError, match="unknown command"):
        run_vpr("spell")


def test_out_of_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("vpr.cli.run", run)
    with pytest.raises(RuntimeError, match="there is too little memory"):
        run_vpr("doctor")


def _result(outcome: str, expected: str = "rejected", seconds: float = 0.1, memory: int = 10**9) -> HostileResult:
    return HostileResult(
        0, "bomb", f"{outcome} {expected} {seconds}", "catalog", expected, outcome, "", seconds, 0.2, memory
    )


def test_each_fault_has_a_figure() -> None:
    outcomes = ("rejected", "set aside", "crash", "hang", "exception", "half-written", "outside")
    results = [_result(outcome) for outcome in outcomes]
    results += [_result("rejected", "accepted"), _result("accepted"), _result("rejected", seconds=MAX_SECONDS + 1)]
    results += [_result("rejected", memory=3 * 10**9)]
    figures, rows = summarise(results, "make")
    values = {figure.name.removeprefix("hostile: "): (figure.value, figure.met) for figure in figures}
    assert values["crashes"] == (1, False)
    assert values["hangs over 10 s"] == (2, False)
    assert values["largest process"] == (3.0, False)
    assert values["writes outside the artifact"] == (1, False)
    assert values["exceptions other than an error line"] == (1, False)
    assert values["files left half-written, older results changed"] == (1, False)
    assert values["valid images rejected, invalid input accepted"] == (2, False)
    assert (rows[0]["inputs"], rows[0]["faults"]) == (10, 9)
