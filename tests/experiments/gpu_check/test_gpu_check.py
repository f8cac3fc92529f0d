from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.figures import ROOT, Figure
from experiments.gpu_check import run_parts as runner
from experiments.gpu_check.__main__ import main
from experiments.gpu_check.latency import Skipped, Variant, torch_latencies
from experiments.gpu_check.parts import PARTS, Part
from experiments.gpu_check.wheels import LIMIT_MIB, PRESENT, WHEELS
from vpr.common.errors import UserError

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
RESULT = ([Figure("a", 1.0, "ms", None, "<=", "make gpu-check")], {"a": [{"x": 1}]})


def measure(is_rehearsal: bool) -> Iterator[Any]:
    yield RESULT


def hang(folder: Path, is_rehearsal: bool) -> Iterator[Any]:
    """Yield a result, then wait with a child."""
    yield RESULT
    child = subprocess.Popen(["sleep", "600"])
    (folder / "child").write_text(str(child.pid))
    child.wait()


def crash(is_rehearsal: bool) -> Iterator[Any]:
    yield RESULT
    os.kill(os.getpid(), signal.SIGSEGV)


def fail(is_rehearsal: bool) -> Iterator[Any]:
    raise ValueError("a bug")
    yield


def skip(is_rehearsal: bool) -> Iterator[Any]:
    raise Skipped("no package")
    yield


def test_clocks_are_described() -> None:
    state = {"sm_clock_mhz": 1200, "max_sm_clock_mhz": 1980, "power_limit_w": 700.0, "throttled": ["power cap"]}
    assert runner.describe_clocks(state) == "1200 of 1980 MHz, power cap"
    assert runner.describe_clocks({}) == ""


@pytest.mark.slow
def test_parts_are_independent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = {"fails": fail, "crashes": crash, "lacks": skip, "measures": measure, "hangs": partial(hang, tmp_path)}
    parts = [Part(name, 10 if name == "hangs" else 600, work) for name, work in works.items()]
    monkeypatch.setattr(runner, "PARTS", tuple(parts))
    kept: list[Any] = []
    outcomes = runner.run_parts((), 6000, True, lambda *result: kept.append(result))
    by_name = {row["part"]: row["outcome"] for row in outcomes}
    assert by_name["fails"] == "failed: ValueError: a bug"
    assert by_name["crashes"] == "failed: its process ended with exit code -11, 1 results kept"
    assert by_name["lacks"] == "skipped: no package"
    assert by_name["measures"] == "measured, 1 results"
    assert by_name["hangs"] == "stopped after 10 s, 1 results kept"
    assert runner._reason_to_skip(parts[0], 3, True) == "no time is left"
    assert [result for result in kept if result[0]] == [RESULT] * 3
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process that a part started outlives it")


def test_missing_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    reasons = {part.name: runner._reason_to_skip(part, 60, True) for part in PARTS if part.runs_on_cpu}
    for name, reason in reasons.items():
        expected = "needs a C++ compiler. Install g++, or name a compiler in CXX." if "-compiled" in name else None
        assert reason == expected, name


@without_gpu
def test_parts_are_skipped_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--output", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu.json").read_text())["tables"]["gpu-check"]
    assert [row["part"] for row in rows] == [part.name for part in PARTS]
    assert {row["outcome"] for row in rows} == {"skipped: PyTorch finds no NVIDIA GPU"}
    assert capsys.readouterr().out.count("PyTorch finds no NVIDIA GPU") == len(PARTS)


@pytest.mark.slow
@without_gpu
def test_rehearsal_runs_what_a_cpu_can_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.gpu_check", "--rehearse", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    content = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {row["part"]: row["outcome"] for row in content["tables"]["gpu-check"]}
    for part in PARTS:
        expected = ("measured",) if part.runs_on_cpu else ("skipped: it needs an NVIDIA GPU",)
        if "compiled" in part.name:  # a busy CPU compiles for longer than the part's time
            expected = (*expected, "stopped after")
        assert outcomes[part.name].startswith(expected), (part.name, outcomes[part.name])
    assert all(figure["value"] > 0 for figure in content["figures"])
    assert any("model FLOP utilisation" in figure["name"] for figure in content["figures"])


def test_unknown_part_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--parts", "teacher"])
    assert end.value.code == 2
    assert "parts: no part 'teacher'. Choose from driver-cuda-bindings" in capsys.readouterr().err
    with pytest.raises(UserError, match="no part 'x'"):
        runner.run_parts(["x"], 60, True, lambda *_: None)


def test_most_valuable_parts_end_within_nine_minutes() -> None:
    names = [part.name for part in PARTS]
    assert names[:4] == ["driver-cuda-bindings", "driver-pycuda", "teacher-full", "student-step"]
    assert sum(part.seconds for part in PARTS[:8]) > 540 > max(part.seconds for part in PARTS)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_latencies_arrive_one_by_one(precision: Any) -> None:
    results = list(torch_latencies("small", (Variant(precision), Variant(precision)), (1, 8), True))
    assert len(results) == 2
    assert results[0][0][0].value > 0  # type: ignore[operator]
    assert [len(tables["gpu-check-small"]) for _, tables in results] == [1, 2]


def test_wheels_are_small_and_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--wheels"])
    assert "open_clip_torch" in capsys.readouterr().out
    assert sum(wheel.size for wheel in WHEELS) <= LIMIT_MIB << 20
    assert min(wheel.size for wheel in WHEELS) > 1000
    locked = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    versions = {wheel.package.lower().replace("_", "-"): wheel.version for wheel in WHEELS}
    assert {name: locked.get(name) for name in versions} == versions


# Imports that are neither there nor brought fail, as on the machine itself.
_RESTRICTED = """
import importlib.metadata, sys
allowed = set(sys.argv[1].split(","))
owners = importlib.metadata.packages_distributions()
class Restricted:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        names = {owner.lower().replace("_", "-") for owner in owners.get(name.partition(".")[0], [])}
        return None if names and not names & allowed else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Restricted(finder) for finder in sys.meta_path]
import experiments.gpu_check.run_parts, experiments.gpu_check.__main__
from experiments.gpu_check.latency import Variant, torch_latencies
from experiments.gpu_check.parts import measure_student, measure_teacher
list(measure_teacher("full", False, 2, True))
list(measure_student(True))
"""
# Parts of PyTorch's own wheels and their dependencies, and of the packages that are there.
_DEPENDENCIES = (
    "cuda-bindings cuda-pathfinder cuda-toolkit filelock fsspec jinja2 mpmath networkx sympy "
    "typing-extensions markupsafe lightning-utilities pytorch-lightning pyyaml aiohttp requests urllib3 certifi idna "
    "charset-normalizer attrs multidict yarl frozenlist aiosignal aiohappyeyeballs propcache hf-xet httpx httpcore h11 "
    "anyio sniffio click typer shellingham protobuf grpcio absl-py markdown werkzeug tensorboard-data-server ml-dtypes "
    "onnx-ir pygments markdown-it-py mdurl contourpy cycler fonttools kiwisolver pyparsing python-dateutil six pytz "
    "importlib-metadata zipp psutil flatbuffers coloredlogs humanfriendly nvidia-ml-py "
    "visual-product-recognition"
)


@pytest.mark.slow
def test_check_imports_only_what_is_there_or_brought() -> None:
    names = {*PRESENT, *(wheel.package for wheel in WHEELS), *_DEPENDENCIES.split()}
    allowed = ",".join(sorted(name.lower().replace("_", "-") for name in names))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _RESTRICTED, allowed]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
