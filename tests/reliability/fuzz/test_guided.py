from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.reliability.fuzz.guided import (
    KEPT,
    NAMES,
    Fuzzed,
    GuidedFuzzConfig,
    _drop_false_alarms,
    _fuzz,
    guided_fuzz,
    summarise,
)
from tests.reliability.fuzz.targets import TARGETS, Target
from vpr.common.errors import UserError

CORPUS = [(name, path.name) for name in NAMES for path in sorted((KEPT / name).iterdir())]
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: make fuzzer"
)


def _refusal(target: str, folder: Path, file: str) -> str:
    """Why a kept input is refused; empty if it is accepted."""
    try:
        TARGETS[target].run(folder, (KEPT / target / file).read_bytes())
    except UserError as error:
        return str(error).replace(str(folder), "")
    return ""


@pytest.mark.parametrize(("target", "file"), CORPUS)
def test_what_was_once_found_is_accepted_or_refused_by_a_line(target: str, file: str, tmp_path: Path) -> None:
    assert _refusal(target, tmp_path, file).isprintable()


@pytest.mark.parametrize(
    ("target", "accepted", "reasons"),
    [
        ("card", 5, ("not a card", "upgrade", "leaves the artifact", "missing", "checksum differs")),
        ("table", 4, ("leads out of", "zero byte", "no value for", "not known", "no area", "utf-8", "two images")),
        ("ranges", 2, ("within FP16's range", "no range for", "does not fit this graph")),
        ("graph", 1, ("another file", "linears: cannot", "Q/DQ: cannot", "FP16: cannot", "InferenceError")),
    ],
)
def test_the_kept_corpus_takes_every_road(target: str, accepted: int, reasons: tuple[str, ...], tmp_path: Path) -> None:
    """Else a fuzzer that begins there would not get past the door."""
    found = []
    for name, file in CORPUS:
        if name == target:
            (tmp_path / file).mkdir()
            found.append(_refusal(target, tmp_path / file, file))
    assert found.count("") >= accepted
    assert [reason for reason in reasons if not any(reason in refusal for refusal in found)] == []


def test_the_kept_corpus_is_small() -> None:
    sizes = [(KEPT / name / file).stat().st_size for name, file in CORPUS]
    assert {name for name, _ in CORPUS} == set(TARGETS) == set(NAMES)
    assert max(sizes) <= min(target.longest for target in TARGETS.values())
    assert sum(sizes) < 200_000


@needs_atheris
@pytest.mark.slow
def test_the_fuzzer_gets_further_than_the_corpus_and_finds_no_fault(tmp_path: Path) -> None:
    for one in guided_fuzz(GuidedFuzzConfig(seconds=10, output=str(tmp_path))):
        assert one.faults == ()
        assert one.seconds >= 10
        assert one.accepted > 10
        assert one.refused > 100
        nothing, kept, all_inputs = one.covered
        assert 2 * nothing < kept < all_inputs


@needs_atheris
@pytest.mark.slow
def test_a_hang_that_does_not_come_again_is_none(tmp_path: Path) -> None:
    """As where a process was stopped for a while; what does not end well again stays a fault."""
    (tmp_path / "timeout-card").write_bytes((KEPT / "card" / "teacher.json").read_bytes())
    (tmp_path / "timeout-nothing").symlink_to(tmp_path / "gone")
    _drop_false_alarms("card", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["timeout-nothing"]


@needs_atheris
def test_faults_are_kept_once_each_and_runs_add_up(tmp_path: Path) -> None:
    from tests.reliability.fuzz.guided_worker import Watched

    def run(folder: Path, data: bytes) -> None:
        if data == b"refused":
            raise UserError("it: is refused: give another")
        if data.startswith(b"fault"):
            raise KeyError(data)

    for number in (1, 2):
        watched = Watched(Target(run, "", 64), tmp_path, 1e9)
        watched._due = float("inf")
        for data in (b"good", b"refused", b"refused", b"fault 1", b"fault 2"):
            watched.run(data)
        watched._due = 0.0
        watched.run(b"good")
        told = json.loads((tmp_path / "told.json").read_text())
        assert (told["accepted"], told["refused"]) == (2 * number, 2 * number)
    (fault,) = (path for path in tmp_path.iterdir() if path.name.startswith("fault-") and not path.suffix)
    assert fault.read_bytes() == b"fault 1"
    assert "KeyError: b'fault 1'" in fault.with_suffix(".txt").read_text()


def test_each_target_has_its_figures() -> None:
    fuzzed = Fuzzed("card", 1860.0, 10, 90, ("fault-1",), (5, 80, 90))
    figures, (row,) = summarise([fuzzed], "make")
    assert [(figure.value, figure.met) for figure in figures] == [(31.0, True), (1.0, False)]
    assert (row["branches: empty input"], row["kept corpus"], row["all inputs"]) == (5, 80, 90)


def test_what_cannot_be_fuzzed_is_refused() -> None:
    with pytest.raises(UserError, match="no target 'cards': choose from card, table"):
        GuidedFuzzConfig(targets=("cards",))
    with pytest.raises(UserError, match=r"seconds: 0\.0: give more than 0"):
        GuidedFuzzConfig(seconds=0.0)


def test_a_target_that_has_had_its_time_is_only_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    def run(target: str, folder: Path, seconds: float, *arguments: str) -> str:
        asked.append(arguments)
        return "INITED cov: 7 ft: 9"

    monkeypatch.setattr("tests.reliability.fuzz.guided._run", run)
    (tmp_path / "told.json").write_text('{"accepted": 1, "refused": 2, "seconds": 5.0}')
    (tmp_path / "fault-1").touch()
    done = _fuzz("card", tmp_path, 5.0)
    assert (done.accepted, done.refused, done.seconds, done.covered) == (1, 2, 5.0, (7, 7, 7))
    assert done.faults == ("fault-1",)
    assert [arguments[-1] for arguments in asked] == ["-runs=0"] * 3
