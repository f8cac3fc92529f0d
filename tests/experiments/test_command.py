"""Modules with flags: an error of the caller is one line and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from experiments.command import run_command
from tests.reliability.fuzz import fuzz, guided
from tests.reliability.hostile import hostile


@pytest.mark.parametrize(
    ("main", "flags", "line"),
    [
        (guided.main, ["--targets", "cards"], "tests.reliability.fuzz.guided: targets: no target 'cards'"),
        (fuzz.main, ["--count", "0"], "tests.reliability.fuzz.fuzz: count: expected 1 or more, got 0."),
        (fuzz.main, ["--cont", "1"], "tests.reliability.fuzz.fuzz: --cont: unknown option. Did you mean --count?"),
        (hostile.main, ["--every", "0"], "tests.reliability.hostile.hostile: every: expected 1 or more, got 0."),
        (hostile.main, ["--first", "1000000"], "tests.reliability.hostile.hostile: first: expected less than "),
    ],
)
def test_wrong_flags_are_one_error_line(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], flags: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].lower().startswith(line.lower())


@dataclass(frozen=True)
class Config:
    """Configuration with one number."""

    number: int = 3


@pytest.mark.parametrize("has_fault", [True, False])
def test_fault_ends_with_exit_code_1(has_fault: bool) -> None:
    numbers: list[int] = []

    def work(config: Config) -> bool:
        numbers.append(config.number)
        return has_fault

    if has_fault:
        with pytest.raises(SystemExit) as end:
            run_command("nothing", "", Config, work, ["--number", "4"])
        assert end.value.code == 1
    else:
        run_command("nothing", "", Config, work, [])
    assert numbers == [4 if has_fault else 3]
