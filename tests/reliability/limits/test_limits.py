from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.commands import COMMANDS, write_inputs
from tests.reliability.limits.options import LimitCase, cases
from tests.reliability.limits.sweep import SweepConfig, SweepResult, summarise, sweep
from tests.reliability.limits.worker import run_case
from tests.reliability.progress import Progress

QUICK = ("catalog", "catalog relocate", "teacher data", "teacher convert", "teacher runs")


def test_the_sweep_has_every_command_with_numbers() -> None:
    names = {case.name for case in cases()}
    assert len(names) == len(cases()) > 800
    for name in (
        "catalog --validation=-1",
        "teacher train --loader.batch-size=9223372036854775807",
        "teacher train --views.scale=[0, 0]",
        "teacher train --stages {train: all, epochs: 1, gamma: 1e308}",
        "student distill --targets.bank=0",
        "export onnx --images=0",
        "bench report --sheet-queries=1",
        "search --rerank.k1=0",
    ):
        assert name in names
    assert {case.command.verb for case in cases()} >= {"calibrate", "export int8", "export engine", "bench latency"}


@pytest.mark.parametrize("case", [case for case in cases() if case.command.verb in QUICK], ids=lambda case: case.name)
def test_quick_commands_end_without_a_traceback(case: LimitCase, tmp_path_factory: pytest.TempPathFactory) -> None:
    result = run_case(_inputs(tmp_path_factory), case)
    assert result["outcome"] in ("accepted", "rejected"), result["line"]


@pytest.mark.reliability
def test_all_commands_end_without_a_traceback() -> None:
    assert [f"{result.case.name}: {result.line}" for result in sweep(SweepConfig()) if result.is_faulty] == []


def test_finished_sweep_is_not_measured_again(tmp_path: Path) -> None:
    """No inputs are made and no worker starts: the second sweep would take minutes otherwise."""
    progress = tmp_path / "options.jsonl"
    chosen = [case for case in cases() if case.command.verb == "export parity"]
    expected = [SweepResult(case, "rejected", f"line {number}") for number, case in enumerate(chosen)]
    for result in expected:
        Progress(progress).add(result.case.name, [result.outcome, result.line])
    with progress.open("a") as stream:
        stream.write('\n["export parity --images=7", "rej')  # a kill
    assert sweep(SweepConfig("export parity"), Progress(progress)) == expected


def test_faults_are_counted_by_command() -> None:
    first, second = cases()[0], next(case for case in cases() if case.command.verb != cases()[0].command.verb)
    results = [SweepResult(first, "crash", "x"), SweepResult(first, "hang", ""), SweepResult(second, "rejected", "")]
    figures, rows = summarise(results, "make")
    assert [(figure.value, figure.met) for figure in figures] == [(3.0, None), (1.0, False)]
    assert [row["tracebacks or crashes"] for row in rows] == [1, 0]
    assert rows[0]["accepted, or still running"] == 1


_MADE: list[Path] = []


def _inputs(factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the inputs of the quick commands, made once."""
    if not _MADE:
        folder = factory.mktemp("limits")
        write_inputs(folder)
        catalog = next(command for command in COMMANDS if command.output == "catalog")
        result = run_case(folder, LimitCase(catalog, ()))
        assert result["outcome"] == "accepted", result
        (folder / "work" / "catalog").rename(folder / "catalog")
        _MADE.append(folder)
    return _MADE[0]
