from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.reliability.case_process import Worker
from tests.reliability.commands import ARTIFACTS, ROUTES, CommandCase, make_artifacts, sign
from tests.reliability.fuzz import worker as fuzz_worker
from tests.reliability.fuzz.fuzz import FuzzConfig, FuzzResult, fuzz, summarise
from tests.reliability.fuzz.mutated_files import mutate_file
from tests.reliability.fuzz.worker import route_of, run_case
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    make_artifacts(folder)
    return folder


def test_sixty_mutated_files_are_refused_by_a_line_or_do_no_harm() -> None:
    """Nearly two of each road, in a process of their own: what a hostile graph breaks must not be this one."""
    found = fuzz(FuzzConfig(count=60, seed=1))
    assert [one for one in found if one.faulty] == []
    assert sum(one.outcome == "refused" for one in found) > 20


@pytest.mark.slow
def test_hundreds_of_mutated_files_neither_crash_nor_hang() -> None:
    found = fuzz(FuzzConfig(count=400, seed=2))
    assert [one for one in found if one.faulty] == []
    assert {(one.artifact, one.file, one.verb) for one in found} == {tuple(vars(route).values()) for route in ROUTES}


def test_the_same_seed_gives_the_same_mutations(originals: Path) -> None:
    for route in ROUTES:
        data = (originals / route.artifact / route.file).read_bytes()
        made = [mutate_file(route.file, data, np.random.default_rng([3, 7])) for _ in range(2)]
        other = mutate_file(route.file, data, np.random.default_rng([3, 8]))
        assert made[0] == made[1] != other


def test_a_share_of_the_mutated_graphs_reaches_the_runtimes(originals: Path) -> None:
    data = (originals / "fp32" / "model.onnx").read_bytes()
    passed = 0
    for seed in range(60):
        _, made = mutate_file("model.onnx", data, np.random.default_rng(seed))
        try:
            onnx.checker.check_model(made, full_check=True)
        except Exception:
            continue
        passed += made != data
    assert passed > 30


def test_signing_makes_every_card_fit_again(originals: Path, tmp_path: Path) -> None:
    from shutil import copytree

    for name in ARTIFACTS:
        copytree(originals / name, tmp_path / name)
    (tmp_path / "fp32" / "model.onnx").write_bytes(b"something else")
    with pytest.raises(UserError, match="checksum differs"):
        load_artifact(tmp_path / "fp32")
    sign(tmp_path, "fp32", "model.onnx")
    loaded = {name: load_artifact(tmp_path / name) for name in ARTIFACTS}
    assert loaded["fp32"].as_parent("onnx") in loaded["ranges"].card.parents
    assert loaded["int8"].as_parent("onnx") in loaded["engine"].card.parents
    assert loaded["fp32"].sha256 != load_artifact(originals / "fp32").sha256


def _leave_a_part(folder: Path) -> None:
    (folder / "out" / ".result.partial-x").mkdir()


def _damage_the_older_result(folder: Path) -> None:
    (folder / "out" / "result" / "card.json").write_text("{}")
    raise UserError("it: failed: try again")


def _stumble(folder: Path) -> None:
    raise KeyError("method")


def _steer_the_terminal(folder: Path) -> None:
    error = UserError("x")
    error.args = ("file \x1b[2J: is bad",)
    raise error


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (_leave_a_part, "half-written"),
        (_damage_the_older_result, "half-written"),
        (_stumble, "exception"),
        (_steer_the_terminal, "exception"),
    ],
)
def test_what_must_not_be_is_seen(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any, outcome: str
) -> None:
    monkeypatch.setitem(fuzz_worker.COMMAND_CASES, route_of(0).verb, CommandCase(run, "ranges"))
    assert run_case(originals, tmp_path / "case", 0, 0)["outcome"] == outcome


_WORKER = """
import os, signal, sys, time
print("{}", flush=True)
for line in sys.stdin:
    if line == "1\\n":
        print("about to end", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    while line == "2\\n":
        pass
    print('{"outcome": "refused"}', flush=True)
"""


def test_a_worker_that_dies_or_hangs_is_told_of_and_replaced(tmp_path: Path) -> None:
    with Worker([sys.executable, "-c", _WORKER], tmp_path / "log", longest=0.3) as worker:
        told = [worker.ask(case) for case in (0, 1, 0, 2, 0)]
    assert [one["outcome"] for one in told] == ["refused", "crash", "refused", "hang", "refused"]
    assert told[1]["line"] == f"signal {signal.SIGSEGV.value}: about to end"


def _told(outcome: str) -> FuzzResult:
    return FuzzResult(0, "fp32", "model.onnx", "calibrate", "flip bits", True, outcome, "", 0.5, 1 << 30)


def test_each_fault_has_its_figure() -> None:
    outcomes = ["refused", "refused", "accepted", "crash", "hang", "exception", "half-written"]
    figures, rows = summarise([_told(one) for one in outcomes], "make")
    values = {figure.name.removeprefix("fuzz: "): (figure.value, figure.met) for figure in figures}
    assert values["mutated files tried"] == (7, False)
    assert values["crashes"] == (1, False)
    assert values["hangs over 5 s"] == (1, False)
    assert values["exceptions other than an error line"] == (1, False)
    assert values["files left half-written, older results changed"] == (1, False)
    assert values["refused by an error line"] == (2, None)
    assert (rows[0]["tried"], rows[0]["refused"], rows[0]["faults"]) == (7, 2, 4)
