from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.latency.cold_start import last_words, measure_cold_starts, peak_memory, start_once
from experiments.figures import ROOT
from export.backends.registry import models_of
from vpr.common.errors import UserError


def test_the_peak_is_the_high_water_mark_of_this_program() -> None:
    status = "Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t  123 kB\nVmRSS:\t  100 kB\n"
    assert peak_memory(status) == 123 * 1024
    assert peak_memory("Name:\tpython\n") is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
def test_the_peak_is_not_inherited_from_who_starts_it() -> None:
    held = bytearray(200 << 20)
    held[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(range(0, len(held), os.sysconf("SC_PAGE_SIZE")))
    code = "from pathlib import Path; print(Path('/proc/self/status').read_text())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak = peak_memory(child.stdout)
    assert peak is not None
    assert peak < len(held) / 2


def test_several_starts_are_one_row(monkeypatch: pytest.MonkeyPatch, student_artifact: Path) -> None:
    seen = iter(
        {
            "cold_start_ms": ms,
            "load_ms": ms / 2,
            "first_call_ms": 1.0,
            "peak_memory_bytes": memory,
            "gpu_memory_bytes": None,
        }
        for ms, memory in ((100.0, 5), (900.0, 7), (120.0, 6))
    )
    monkeypatch.setattr("benchmarks.latency.cold_start.start_once", lambda model, threads: next(seen))
    row = measure_cold_starts(models_of(student_artifact)[0], 1, 3)
    assert (row["cold_start_ms"], row["load_ms"], row["peak_memory_bytes"]) == (120, 60, 7)
    assert row["gpu_memory_bytes"] is None
    assert set(measure_cold_starts(models_of(student_artifact)[0], 1, 0).values()) == {None}


def test_a_child_that_fails_is_told_in_one_line(student_artifact: Path, tmp_path: Path) -> None:
    (model,) = models_of(student_artifact)
    gone = replace(model, artifact=replace(model.artifact, path=tmp_path / "gone"))
    with pytest.raises(UserError, match=r"student \(torch\): fails in a process of its own \(.*gone.*--starts 0"):
        start_once(gone, 1)


def test_what_is_said_on_the_way_is_no_reason() -> None:
    traceback = "Traceback (most recent call last):\n  File ...\nMemoryError: 3 GB\n"
    assert last_words("  openvino: no VNNI\n" + traceback) == "MemoryError: 3 GB"
    assert last_words(traceback + "  said after it\n\n") == "MemoryError: 3 GB"
    assert last_words("  openvino: no VNNI\n") == last_words("") == "no reason given"


def test_running_a_graph_or_an_engine_imports_no_torch() -> None:
    code = "import benchmarks.latency.cold_start, export.tensorrt.runner, export.backends.openvino_runtime, sys; print('torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "False"
