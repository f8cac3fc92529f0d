from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.figures import Figure
from tests.reliability.soak.round import make, one_round
from tests.reliability.soak.soak import Sample, SoakConfig, read_samples, record_rounds, soak, summarise
from vpr.common.errors import UserError

SECONDS = 2.0


@pytest.fixture(autouse=True)
def _few_objects() -> Iterator[None]:
    """The collector, which runs once a round, passes over what other tests keep."""
    gc.freeze()
    yield
    gc.unfreeze()


def figures_of(samples: list[Sample]) -> dict[str, Figure]:
    return {figure.name.removeprefix("soak: "): figure for figure in summarise(samples, 0.2, "command")[0]}


def soaked(folder: Path, work: Callable[[], object]) -> dict[str, Figure]:
    def paced() -> str:
        work()
        time.sleep(0.01)
        return "same"

    return figures_of(read_samples(record_rounds(SoakConfig(SECONDS / 3600, str(folder)), paced)))


def test_kept_memory_is_seen_as_growth_on_the_heap_and_in_ram(tmp_path: Path) -> None:
    kept: list[bytes] = []
    figures = soaked(tmp_path, lambda: kept.append(b"x" * (1 << 19)))
    rate = len(kept) / 2 / (SECONDS / 3600)  # half a MiB each
    for kind in ("resident", "anonymous", "heap"):
        figure = figures[f"slope of {kind} memory"]
        assert figure.interval is not None
        assert figure.interval[0] > 0
        assert figure.value == pytest.approx(rate, rel=0.2)
        if kind != "heap":
            assert figures[f"slope of {kind} memory: from its interval to zero"].met is False
    assert figures["rounds that found something else than the first"].met is True
    assert figures["more files at the end"].met is True


def test_kept_files_are_counted(tmp_path: Path) -> None:
    kept: list[int] = []
    figures = soaked(tmp_path, lambda: kept.append(os.open(__file__, os.O_RDONLY)))
    for descriptor in kept:
        os.close(descriptor)
    assert figures["more files at the end"].met is False
    assert figures["more files at the end"].value == pytest.approx(0.8 * len(kept), rel=0.1)


def test_steady_samples_meet_the_goals_and_a_different_answer_does_not() -> None:
    steady = [
        Sample(hour / 100, hour / 90, hour / 200, 700 + hour % 3, 400 + hour % 5, 300, 16, 9, "a")
        for hour in range(1, 201)
    ]
    figures = figures_of(steady)
    assert all(figure.met in (True, None) for figure in figures.values())
    assert figures["time that it ran"].value == 2
    odd = [*steady[:-1], replace(steady[-1], answers="b", threads=17)]
    figures = figures_of(odd)
    assert [name for name, figure in figures.items() if figure.met is False] == [
        "more threads at the end",
        "rounds that found something else than the first",
    ]


def test_an_interrupted_soak_can_be_read(tmp_path: Path) -> None:
    path = record_rounds(SoakConfig(0.1 / 3600, str(tmp_path)), lambda: time.sleep(0.01) or "a")
    whole = read_samples(path)
    assert len(whole) > 2
    path.write_bytes(path.read_bytes()[:-3])
    assert read_samples(path) == whole[:-1]


def test_an_earlier_soak_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text("kept", encoding="utf-8")
    with pytest.raises(UserError, match="is of an earlier soak: move it away"):
        soak(SoakConfig(output=str(tmp_path)))
    with pytest.raises(UserError, match="hours: -1: give 0 to 1000"):
        SoakConfig(hours=-1)


def test_a_stop_does_not_count_as_running() -> None:
    code = """
import sys, time
from tests.reliability.soak import running_clock
running_clock._TICK, running_clock._LATE = 0.05, 0.5
with running_clock.RunningClock() as clock:
    begun = time.monotonic()
    print("running", flush=True)
    sys.stdin.readline()
    print(clock.seconds, time.monotonic() - begun)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    counted, passed = map(float, process.communicate("\n", timeout=30)[0].split())
    assert passed - counted > 2.4
    assert counted > 0.2


def test_names_that_come_and_go_do_not_count_as_growth() -> None:
    code = """
import sys
from tests.reliability.footprint import heap_in_use
from tests.reliability.soak.soak import make_room_for_names
make_room_for_names()
first = heap_in_use()
for number in range(300):
    names = [sys.intern(f"{number} {name}") for name in range(1300)]
    del names
print((heap_in_use() - first) / 2**20)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert abs(float(told.stdout)) < 1


@pytest.mark.slow
def test_a_round_trains_embeds_and_searches_and_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path / "made")
    before = sorted(tmp_path.rglob("*"))
    answers = {one_round(tmp_path / "made", tmp_path / "round") for _ in range(2)}
    assert len(answers) == 1
    assert sorted(tmp_path.rglob("*")) == before
