from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report.schema import Latency, Timing
from experiments.latency.figures import compare_runs, noise, open_loop, truth
from export.config import OnnxConfig
from export.to_onnx import export_onnx


def _run(**rows: tuple[float, str | None]) -> dict[str, Timing]:
    latencies = {name: Latency(p50=p50, p90=p50, p99=p50, unstable=why) for name, (p50, why) in rows.items()}
    timings = {name: Timing(latency_ms={"1": latency}) for name, latency in latencies.items()}
    return {**timings, "absent": Timing(latency_ms=None, notes="not run: no GPU")}


def test_moved_rows_are_explained_or_counted() -> None:
    first = _run(still=(10.0, None), jumpy=(10.0, "second half +9% against the first"), moved=(10.0, None))
    second = _run(still=(10.3, None), jumpy=(13.0, None), moved=(10.8, None))
    rows, moves = compare_runs(first, second)
    assert moves == pytest.approx([0.03, 0.08])  # rows that a run itself marks unstable do not count
    reasons = {row["model"]: row["unstable"] for row in rows}
    assert reasons == {
        "still": "",
        "jumpy": "run 1: second half +9% against the first",
        "moved": "p50 moved by +8.0% between the runs",
    }


@pytest.mark.slow
def test_all_parts_run(student_artifact: Path, tmp_path: Path) -> None:
    fp32 = str(export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp32"), images=2)))
    figures, rows = noise((fp32,), 0.02, ("onnxruntime-cpu",), "make")
    assert [row["model"] for row in rows] == ["fp32 (onnxruntime-cpu)"]
    assert figures[1].value in (0, 1)
    figures, rows = open_loop((fp32,), 0.05, "make")
    assert [figure.name.split(":")[0] for figure in figures] == ["fp32 (onnxruntime-cpu)", "fp32 (openvino)"]
    assert len(rows) == 6
    for figure in figures:
        assert figure.interval is not None
        assert figure.interval[0] <= figure.value <= figure.interval[1]
    figures, rows = truth((fp32,), 0.02, 2, 3, "make")
    assert len(figures) == 1
    assert float(rows[0]["pyperf, median ms"]) > 0
