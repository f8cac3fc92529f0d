from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.reliability.case_process import Worker
from tests.reliability.cases import ARTIFACTS, ROUTES, Case, make_artifacts, sign
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


@pytest.mark.reliability
def test_sixty_mutated_files_are_harmless() -> None:
    """Nearly two files of each route, in another process: a hostile graph may crash it."""
    results = fuzz(FuzzConfig(count=60, seed=1))
    assert [result for result in results if result.is_faulty] == []
    assert sum(result.outcome == "rejected" for result in results) > 20


@pytest.mark.reliability
def test_hundreds_of_mutated_files_are_harmless() -> None:
    results = fuzz(FuzzConfig(count=400, seed=2))
    assert [result for result in results if result.is_faulty] == []
    routes = {(result.artifact, result.file, result.verb) for result in results}
    assert routes == {tuple(vars(route).values()) for route in ROUTES}


def test_same_seed_gives_same_mutations(originals: Path) -> None:
    for route in ROUTES:
        data = (originals / route.artifact / route.file).read_bytes()
        mutations = [mutate_file(route.file, data, np.random.default_rng([3, 7])) for _ in range(2)]
        other = mutate_file(route.file, data, np.random.default_rng([3, 8]))
        assert mutations[0] == mutations[1] != other


def test_many_mutated_graphs_pass_the_checker(originals: Path) -> None:
    data = (originals / "fp32" / "model.onnx").read_bytes()
    passed = 0
    for seed in range(60):
        _, mutated = mutate_file("model.onnx", data, np.random.default_rng(seed))
        try:
            onnx.checker.check_model(mutated, full_check=True)
        except Exception:
            continue
        passed += mutated != data
    assert passed > 30


def test_signing_updates_every_card(originals: Path, tmp_path: Path) -> None:
    for name in ARTIFACTS:
        shutil.copytree(originals / name, tmp_path / name)
    (tmp_path / "fp32" / "model.onnx").write_bytes(b"something else")
    with pytest.raises(UserError, match="checksum differs"):
        load_artifact(tmp_path / "fp32")
    sign(tmp_path, "fp32", "model.onnx")
    artifacts = {name: load_artifact(tmp_path / name) for name in ARTIFACTS}
    assert artifacts["fp32"].as_parent("onnx") in artifacts["ranges"].card.parents
    assert artifacts["int8"].as_parent("onnx") in artifacts["engine"].card.parents
    assert artifacts["fp32"].sha256 != load_artifact(originals / "fp32").sha256


def _leave_partial_result(folder: Path) -> None:
    (folder / "out" / ".result.partial-x").mkdir()


def _damage_older_result(folder: Path) -> None:
    (folder / "out" / "result" / "card.json").write_text("{}")
    raise UserError("it failed. Try again.")


def _raise_key_error(folder: Path) -> None:
    raise KeyError("method")


def _raise_control_codes(folder: Path) -> None:
    error = UserError("x")
    error.args = ("file \x1b[2J: is bad",)
    raise error


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (_leave_partial_result, "half-written"),
        (_damage_older_result, "half-written"),
        (_raise_key_error, "exception"),
        (_raise_control_codes, "exception"),
    ],
)
def test_faults_are_detected(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any, outcome: str
) -> None:
    monkeypatch.setitem(fuzz_worker.CASES, route_of(0).verb, Case(run, "ranges"))
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
    print('{"outcome": "rejected"}', flush=True)
"""


def test_dead_or_hanging_worker_is_replaced(tmp_path: Path) -> None:
    with Worker([sys.executable, "-c", _WORKER], tmp_path / "log", max_seconds=0.3) as worker:
        results = [worker.run(case) for case in (0, 1, 0, 2, 0)]
    assert [result["outcome"] for result in results] == ["rejected", "crash", "rejected", "hang", "rejected"]
    assert results[1]["line"] == f"signal {signal.SIGSEGV.value}: about to end"


def _result(outcome: str) -> FuzzResult:
    return FuzzResult(0, "fp32", "model.onnx", "calibrate", "flip bits", True, outcome, "", 0.5, 1 << 30)


def test_each_fault_has_a_figure() -> None:
    outcomes = ["rejected", "rejected", "accepted", "crash", "hang", "exception", "half-written"]
    figures, rows = summarise([_result(outcome) for outcome in outcomes], "make")
    values = {figure.name.removeprefix("fuzz: "): (figure.value, figure.met) for figure in figures}
    assert values["mutated files tried"] == (7, False)
    assert values["crashes"] == (1, False)
    assert values["hangs over 5 s"] == (1, False)
    assert values["exceptions other than an error line"] == (1, False)
    assert values["files left half-written, older results changed"] == (1, False)
    assert values["rejected with an error line"] == (2, None)
    assert (rows[0]["tried"], rows[0]["rejected"], rows[0]["faults"]) == (7, 2, 4)
