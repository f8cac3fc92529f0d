from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.figures import Figure
from tests.reliability.soak.round import make_inputs, run_round
from tests.reliability.soak.soak import SAMPLES, Sample, SoakConfig, read_samples, record_rounds, soak, summarise
from vpr.common.errors import UserError

ROUNDS = 100


@pytest.fixture(autouse=True)
def _few_objects() -> Iterator[None]:
    """Exclude objects of other tests from the garbage collection of each round, which would take most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def figures_of(samples: list[Sample]) -> dict[str, Figure]:
    return {figure.name.removeprefix("soak: "): figure for figure in summarise(samples, 0.2, "command")[0]}


def interrupted_soak(folder: Path, rounds: int, work: Callable[[], object]) -> list[Sample]:
    """Return the samples of a soak that is interrupted after a number of rounds, however long they take."""
    started: list[str] = []

    def work_and_sleep() -> str:
        if len(started) == rounds:
            raise KeyboardInterrupt
        started.append("same")
        work()
        time.sleep(0.01)
        return started[-1]

    with pytest.raises(KeyboardInterrupt):
        record_rounds(SoakConfig(1, str(folder)), work_and_sleep)
    return read_samples(folder / SAMPLES)


def leak_memory(folder: Path) -> tuple[dict[str, Figure], float]:
    """Return the figures of rounds that leak half a MiB each, and the rate of the leak in MiB/h."""
    gc.collect()
    gc.freeze()
    leaked: list[bytes] = []
    samples = interrupted_soak(folder, ROUNDS, lambda: leaked.append(b"x" * (1 << 19)))
    return figures_of(samples), len(leaked) / 2 / samples[-1].hours


@pytest.mark.reliability
def test_leaked_memory_is_detected(tmp_path: Path) -> None:
    # A new process: a leak that fills memory that other tests have freed does not raise the resident memory.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        figures, rate = pool.submit(leak_memory, tmp_path).result()
    for kind in ("resident", "anonymous", "heap"):
        figure = figures[f"slope of {kind} memory"]
        assert figure.interval is not None
        assert figure.interval[0] > 0
        assert figure.value == pytest.approx(rate, rel=0.2)
        if kind != "heap":
            assert figures[f"slope of {kind} memory: from its interval to zero"].met is False
    assert figures["rounds with other results than the first"].met is True
    assert figures["more files at the end"].met is True


def test_leaked_files_are_counted(tmp_path: Path) -> None:
    leaked: list[int] = []
    figures = figures_of(interrupted_soak(tmp_path, ROUNDS, lambda: leaked.append(os.open(__file__, os.O_RDONLY))))
    for descriptor in leaked:
        os.close(descriptor)
    assert figures["more files at the end"].met is False
    assert figures["more files at the end"].value == pytest.approx(0.8 * len(leaked), rel=0.1)


def test_steady_samples_meet_the_goals() -> None:
    steady = [
        Sample(hour / 100, hour / 90, hour / 200, 700 + hour % 3, 400 + hour % 5, 300, 16, 9, "a")
        for hour in range(1, 201)
    ]
    figures = figures_of(steady)
    assert all(figure.met in (True, None) for figure in figures.values())
    assert figures["running time"].value == 2
    changed = [*steady[:-1], replace(steady[-1], answers="b", threads=17)]
    figures = figures_of(changed)
    assert [name for name, figure in figures.items() if figure.met is False] == [
        "more threads at the end",
        "rounds with other results than the first",
    ]


def test_interrupted_soak_is_readable(tmp_path: Path) -> None:
    samples = interrupted_soak(tmp_path, 4, lambda: None)
    assert len(samples) == 4
    path = tmp_path / SAMPLES
    path.write_bytes(path.read_bytes()[:-3])
    assert read_samples(path) == samples[:-1]


def test_earlier_soak_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text("earlier", encoding="utf-8")
    with pytest.raises(UserError, match="belongs to an earlier soak"):
        soak(SoakConfig(output=str(tmp_path)))
    with pytest.raises(UserError, match="hours: expected 0 to 1000, got -1"):
        SoakConfig(hours=-1)


@pytest.mark.reliability
def test_suspension_is_not_running_time() -> None:
    code = """
import sys, time
from tests.reliability.soak import running_clock
running_clock._TICK, running_clock._MAX_TICK = 0.05, 0.5
with running_clock.RunningClock() as clock:
    start = time.monotonic()
    print("running", flush=True)
    sys.stdin.readline()
    print(clock.seconds, time.monotonic() - start)
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


def test_interned_names_are_no_growth() -> None:
    code = """
import sys
from tests.reliability.footprint import heap_in_use
from tests.reliability.soak.soak import grow_intern_table
grow_intern_table()
first = heap_in_use()
for number in range(300):
    names = [sys.intern(f"{number} {name}") for name in range(1300)]
    del names
print((heap_in_use() - first) / 2**20)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert abs(float(process.stdout)) < 1


@pytest.mark.reliability
def test_round_leaves_no_files(tmp_path: Path) -> None:
    make_inputs(tmp_path / "inputs")
    before = sorted(tmp_path.rglob("*"))
    answers = {run_round(tmp_path / "inputs", tmp_path / "round") for _ in range(2)}
    assert len(answers) == 1
    assert sorted(tmp_path.rglob("*")) == before
