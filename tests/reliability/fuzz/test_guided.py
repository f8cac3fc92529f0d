from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.reliability.fuzz.guided import (
    CORPUS,
    NAMES,
    GuidedFuzzConfig,
    TargetResult,
    _drop_false_alarms,
    _fuzz_target,
    guided_fuzz,
    summarise,
)
from tests.reliability.fuzz.targets import TARGETS, Target
from vpr.common.errors import UserError

FILES = [(name, path.name) for name in NAMES for path in sorted((CORPUS / name).iterdir())]
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: make fuzzer"
)


def _rejection(target: str, folder: Path, file: str) -> str:
    """Return the error message for a stored input; empty if it is accepted."""
    try:
        TARGETS[target].run(folder, (CORPUS / target / file).read_bytes())
    except UserError as error:
        return str(error).replace(str(folder), "")
    return ""


@pytest.mark.parametrize(("target", "file"), FILES)
def test_stored_input_is_accepted_or_one_error_line(target: str, file: str, tmp_path: Path) -> None:
    assert _rejection(target, tmp_path, file).isprintable()


@pytest.mark.parametrize(
    ("target", "accepted", "reasons"),
    [
        ("card", 5, ("not a card", "Upgrade", "leads out of the artifact", "missing", "checksum differs")),
        (
            "table",
            4,
            ("leads out of", "zero byte", "cannot be used", "not known", "out of range", "utf-8", "two images"),
        ),
        ("ranges", 2, ("within FP16's range", "no range for", "does not fit this graph")),
        ("graph", 1, ("outside the artifact", "linears: cannot", "Q/DQ: cannot", "FP16: cannot", "InferenceError")),
    ],
)
def test_corpus_covers_every_rejection(target: str, accepted: int, reasons: tuple[str, ...], tmp_path: Path) -> None:
    """A fuzzer that starts with less would be stopped by the first check."""
    rejections = []
    for name, file in FILES:
        if name == target:
            (tmp_path / file).mkdir()
            rejections.append(_rejection(target, tmp_path / file, file))
    assert rejections.count("") >= accepted
    assert [reason for reason in reasons if not any(reason in rejection for rejection in rejections)] == []


def test_corpus_is_small() -> None:
    sizes = [(CORPUS / name / file).stat().st_size for name, file in FILES]
    assert {name for name, _ in FILES} == set(TARGETS) == set(NAMES)
    assert max(sizes) <= min(target.max_size for target in TARGETS.values())
    assert sum(sizes) < 200_000


@needs_atheris
@pytest.mark.reliability
def test_fuzzer_extends_coverage_without_fault(tmp_path: Path) -> None:
    for result in guided_fuzz(GuidedFuzzConfig(seconds=10, output=str(tmp_path))):
        assert result.faults == ()
        assert result.seconds >= 10
        assert result.accepted > 10
        assert result.rejected > 100
        of_empty, of_corpus, of_all = result.coverage
        assert 2 * of_empty < of_corpus < of_all


@needs_atheris
@pytest.mark.reliability
def test_hang_that_does_not_repeat_is_dropped(tmp_path: Path) -> None:
    """A suspended process looks like a hang; an input that fails again stays a fault."""
    (tmp_path / "timeout-card").write_bytes((CORPUS / "card" / "teacher.json").read_bytes())
    (tmp_path / "timeout-nothing").symlink_to(tmp_path / "gone")
    _drop_false_alarms("card", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["timeout-nothing"]


@needs_atheris
def test_faults_are_stored_once_and_counts_add_up(tmp_path: Path) -> None:
    from tests.reliability.fuzz.guided_worker import CountedTarget

    def run(folder: Path, data: bytes) -> None:
        if data == b"rejected":
            raise UserError("it: is rejected. Choose another.")
        if data.startswith(b"fault"):
            raise KeyError(data)

    for number in (1, 2):
        counted = CountedTarget(Target(run, "", 64), tmp_path, 1e9)
        counted._next_write = float("inf")
        for data in (b"good", b"rejected", b"rejected", b"fault 1", b"fault 2"):
            counted.run(data)
        counted._next_write = 0.0
        counted.run(b"good")
        counts = json.loads((tmp_path / "counts.json").read_text())
        assert (counts["accepted"], counts["rejected"]) == (2 * number, 2 * number)
    (fault,) = (path for path in tmp_path.iterdir() if path.name.startswith("fault-") and not path.suffix)
    assert fault.read_bytes() == b"fault 1"
    assert "KeyError: b'fault 1'" in fault.with_suffix(".txt").read_text()


def test_each_target_has_figures() -> None:
    result = TargetResult("card", 1860.0, 10, 90, ("fault-1",), (5, 80, 90))
    figures, (row,) = summarise([result], "make")
    assert [(figure.value, figure.met) for figure in figures] == [(31.0, True), (1.0, False)]
    assert (row["branches: empty input"], row["stored corpus"], row["all inputs"]) == (5, 80, 90)


def test_invalid_configuration_is_rejected() -> None:
    with pytest.raises(UserError, match="no target 'cards'. Choose from card, table"):
        GuidedFuzzConfig(targets=("cards",))
    with pytest.raises(UserError, match=r"seconds: expected more than 0, got 0\.0\."):
        GuidedFuzzConfig(seconds=0.0)


def test_target_with_no_time_left_is_only_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, ...]] = []

    def run(target: str, folder: Path, seconds: float, *arguments: str) -> str:
        calls.append(arguments)
        return "INITED cov: 7 ft: 9"

    monkeypatch.setattr("tests.reliability.fuzz.guided._run", run)
    (tmp_path / "counts.json").write_text('{"accepted": 1, "rejected": 2, "seconds": 5.0}')
    (tmp_path / "fault-1").touch()
    result = _fuzz_target("card", tmp_path, 5.0)
    assert (result.accepted, result.rejected, result.seconds, result.coverage) == (1, 2, 5.0, (7, 7, 7))
    assert result.faults == ("fault-1",)
    assert [arguments[-1] for arguments in calls] == ["-runs=0"] * 3
