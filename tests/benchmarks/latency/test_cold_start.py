from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.latency.cold_start import ColdStart, last_error_line, measure_cold_starts, parse_peak_memory, start_once
from experiments.figures import ROOT
from export.backends.registry import models_of
from vpr.common.errors import UserError


def test_peak_memory_is_the_high_water_mark() -> None:
    status = "Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t  123 kB\nVmRSS:\t  100 kB\n"
    assert parse_peak_memory(status) == 123 * 1024
    assert parse_peak_memory("Name:\tpython\n") is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
def test_peak_memory_is_not_inherited_from_the_parent() -> None:
    held = bytearray(200 << 20)
    held[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(range(0, len(held), os.sysconf("SC_PAGE_SIZE")))
    code = "from pathlib import Path; print(Path('/proc/self/status').read_text())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak = parse_peak_memory(child.stdout)
    assert peak is not None
    assert peak < len(held) / 2


def test_several_starts_give_medians_and_largest_memory(
    monkeypatch: pytest.MonkeyPatch, student_artifact: Path
) -> None:
    starts = iter(ColdStart(ms, ms / 2, 1.0, memory) for ms, memory in ((100.0, 5), (900.0, 7), (120.0, 6)))
    monkeypatch.setattr("benchmarks.latency.cold_start.start_once", lambda model, threads: next(starts))
    assert measure_cold_starts(models_of(student_artifact)[0], 1, 3) == ColdStart(120, 60, 1.0, 7, None)
    assert measure_cold_starts(models_of(student_artifact)[0], 1, 0) == ColdStart()


def test_failing_child_gives_a_one_line_error(student_artifact: Path, tmp_path: Path) -> None:
    (model,) = models_of(student_artifact)
    missing = replace(model, artifact=replace(model.artifact, path=tmp_path / "missing"))
    with pytest.raises(
        UserError, match=r"student \(torch\): its start in a new process failed \(.*missing.*--starts 0"
    ):
        start_once(missing, 1)


def test_start_reads_no_kernels_of_earlier_runs(student_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX would otherwise not compile in the starts after the first one."""

    class Started(Exception):
        pass

    def record(command: list[str], env: dict[str, str], **_: object) -> None:
        assert {**os.environ, "VPR_KERNEL_CACHE": "none"} == env
        raise Started

    monkeypatch.setenv("VPR_KERNEL_CACHE", "/of/the/user")
    monkeypatch.setattr("benchmarks.latency.cold_start.subprocess.Popen", record)
    with pytest.raises(Started):
        start_once(models_of(student_artifact)[0], 1)


def test_progress_lines_are_not_the_error() -> None:
    traceback = "Traceback (most recent call last):\n  File ...\nMemoryError: 3 GB\n"
    assert last_error_line("  openvino: no VNNI\n" + traceback) == "MemoryError: 3 GB"
    assert last_error_line(traceback + "  said after it\n\n") == "MemoryError: 3 GB"
    assert last_error_line("  openvino: no VNNI\n") == last_error_line("") == "no reason given"


def test_running_a_graph_or_engine_imports_no_torch() -> None:
    modules = "benchmarks.latency.cold_start, export.tensorrt.runner, export.backends.openvino_runtime"
    code = f"import {modules}, sys; print('torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "False"
