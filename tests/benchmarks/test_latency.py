from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.backends import BackendUnavailable, models_of
from benchmarks.latency import measure, summarise, time_models
from export.engine import EngineConfig, build_engine
from export.onnx_graph import OnnxConfig, export_onnx


class Clock:
    """A clock that only moves when a call costs something."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float) -> object:
        costs = iter(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += next(costs, seconds[-1])

        return run


def test_calls_are_warmed_up_until_steady_and_interleaved() -> None:
    clock = Clock()
    slow_start = [0.5] * 7 + [0.01]
    times = measure({"a": clock.call("a", *slow_start), "b": clock.call("b", 0.02)}, 0.4, clock)
    assert times["a"].max() == pytest.approx(10)
    assert times["b"] == pytest.approx(20)
    assert len(times["a"]) == pytest.approx(40, abs=10)
    assert len(times["b"]) == pytest.approx(20, abs=10)
    changes = sum(x != y for x, y in zip(clock.order, clock.order[1:], strict=False))
    assert changes >= 20  # ten rounds of each


def test_a_call_that_never_settles_is_still_measured() -> None:
    clock = Clock()
    alternating = [0.1, 0.3] * 200
    assert len(measure({"a": clock.call("a", *alternating)}, 0.1, clock)["a"]) >= 10


def test_percentiles_are_numpy_s() -> None:
    values = np.random.default_rng(0).gamma(2, 5, 999)
    found = summarise(values)
    assert found["p50"] == np.median(values)
    assert found["p99"] == np.percentile(values, 99)
    assert found["calls"] == 999


def test_every_backend_of_every_artifact_is_timed_or_gives_its_reason(student_artifact: Path, tmp_path: Path) -> None:
    fp16 = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp16"), precision="fp16"))
    engine = build_engine(EngineConfig(str(fp16), str(tmp_path / "engine"), target="sm86"))
    rows = time_models((str(student_artifact), str(fp16), str(engine)), (1, 8), 0.05, threads=1)
    assert set(rows) == {"student (torch)", "fp16 (onnxruntime-cpu)", "fp16 (openvino)", "engine (tensorrt-rtx)"}
    engine_row = rows.pop("engine (tensorrt-rtx)")
    assert engine_row["latency_ms"] is None
    assert "built for sm86" in engine_row["notes"]
    for row in rows.values():
        assert row["cold_start_ms"] > 0
        for batch in (1, 8):
            p50 = row["latency_ms"][str(batch)]["p50"]
            assert p50 > 0
            assert row["throughput"][str(batch)] == pytest.approx(1000 * batch / p50)


def test_all_backends_compute_the_same_embeddings(student_artifact: Path, tmp_path: Path) -> None:
    fp32 = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp32")))
    batch = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    runs = [model.open(1)(batch) for path in (student_artifact, fp32) for model in models_of(path)]
    assert len(runs) == 3
    for found in runs[1:]:
        np.testing.assert_allclose(found, runs[0], atol=2e-5)


def test_an_engine_without_a_gpu_says_what_it_needs(student_artifact: Path, tmp_path: Path) -> None:
    fp16 = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp16"), precision="fp16"))
    engine = build_engine(EngineConfig(str(fp16), str(tmp_path / "engine"), target="sm89"))
    (model,) = models_of(engine)
    with pytest.raises(BackendUnavailable, match="built for sm89"):
        model.open(1)
