"""The benchmarks that are run as modules: what the caller can put right ends in one line and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from experiments.command import run_command
from tests.reliability.fuzz import fuzz
from tests.reliability.fuzz import guided as guided_fuzz
from tests.reliability.hostile import hostile


@pytest.mark.parametrize(
    ("main", "flags", "line"),
    [
        (guided_fuzz.main, ["--targets", "cards"], "tests.reliability.fuzz.guided: targets: no target 'cards'"),
        (fuzz.main, ["--count", "0"], "tests.reliability.fuzz.fuzz: count: 0: give 1 or more"),
        (fuzz.main, ["--cont", "1"], "tests.reliability.fuzz.fuzz: --cont: unknown option. Did you mean --count?"),
        (hostile.main, ["--every", "0"], "tests.reliability.hostile.hostile: every: 0: give 1 or more"),
        (hostile.main, ["--first", "1000000"], "tests.reliability.hostile.hostile: first: 1000000: there are "),
    ],
)
def test_wrong_flags_are_refused_in_a_line(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], flags: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].lower().startswith(line.lower())


@dataclass(frozen=True)
class Config:
    """Of nothing."""

    number: int = 3


@pytest.mark.parametrize("faulty", [True, False])
def test_a_fault_that_is_found_ends_with_1(faulty: bool) -> None:
    seen: list[int] = []

    def work(config: Config) -> bool:
        seen.append(config.number)
        return faulty

    if faulty:
        with pytest.raises(SystemExit) as ended:
            run_command("nothing", "", Config, work, ["--number", "4"])
        assert ended.value.code == 1
    else:
        run_command("nothing", "", Config, work, [])
    assert seen == [4 if faulty else 3]
