from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.reliability.commands import CommandCase
from tests.reliability.hostile.hostile import LONGEST, HostileConfig, HostileResult, attack, summarise
from tests.reliability.hostile.images import images
from tests.reliability.hostile.routes import ROADS, command
from tests.reliability.hostile.worker import _seen, cases
from vpr.common.errors import UserError


@pytest.mark.slow
def test_some_of_every_kind_of_attack_do_no_harm() -> None:
    """Each is refused by a line, set aside with a reason or read rightly; time, memory and what is written are seen."""
    found = attack(HostileConfig(every=41))
    assert [one for one in found if one.faulty] == []
    assert len({one.kind for one in found}) >= 12


@pytest.mark.slow
def test_no_attack_does_harm() -> None:
    found = attack(HostileConfig())
    assert [one for one in found if one.faulty] == []
    assert {one.road for one in found} == set(ROADS)


def test_three_hundred_inputs_differ_in_more_than_their_names() -> None:
    assert len({(case.kind, case.name) for case in cases()}) >= 300
    assert len({(case.kind, case.name, case.road) for case in cases()}) == len(cases())
    small = [one for one in images() if not one.kind.startswith("bomb")]
    assert len({hashlib.sha256(one.make()).digest() for one in small if "50000000" not in one.name}) > 0.95 * len(small)


def test_what_is_written_around_an_artifact_is_seen(tmp_path: Path) -> None:
    (tmp_path / "case" / "out").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "kept").write_text("a")
    before = _seen(tmp_path)
    (tmp_path / "case" / "out" / "result").write_text("x")
    assert _seen(tmp_path) == before
    (tmp_path / "home" / "kept").write_text("b")
    (tmp_path / "escaped.png").write_text("")
    after = _seen(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {"home/kept", "escaped.png"}


def test_a_command_s_line_is_told_from_other_ends(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        command("catalog", "--reader", "folder", "--root", str(tmp_path / "absent"), "--output", str(tmp_path / "o"))
    with pytest.raises(UserError, match="unknown command"):
        command("spell")
    assert isinstance(ROADS["upload"], CommandCase)


def test_a_command_that_runs_out_of_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("vpr.cli.run", run)
    with pytest.raises(RuntimeError, match="there is too little memory"):
        command("doctor")


def _told(outcome: str, expected: str = "refused", seconds: float = 0.1, memory: int = 10**9) -> HostileResult:
    return HostileResult(
        0, "bomb", f"{outcome} {expected} {seconds}", "catalog", expected, outcome, "", seconds, 0.2, memory
    )


def test_each_fault_has_its_figure() -> None:
    found = [_told(one) for one in ("refused", "set aside", "crash", "hang", "exception", "half-written", "outside")]
    found += [_told("refused", "taken"), _told("accepted"), _told("refused", seconds=LONGEST + 1)]
    found += [_told("refused", memory=3 * 10**9)]
    figures, rows = summarise(found, "make")
    values = {figure.name.removeprefix("hostile: "): (figure.value, figure.met) for figure in figures}
    assert values["crashes"] == (1, False)
    assert values["hangs over 10 s"] == (2, False)
    assert values["largest process"] == (3.0, False)
    assert values["writes outside the artifact"] == (1, False)
    assert values["exceptions other than an error line"] == (1, False)
    assert values["files left half-written, older results changed"] == (1, False)
    assert values["refused where it is a good image, or taken where it is none"] == (2, False)
    assert (rows[0]["inputs"], rows[0]["faults"]) == (10, 9)
