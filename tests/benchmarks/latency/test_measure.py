from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.config import LatencyConfig
from benchmarks.latency.measure import measure_latency
from export.backends.registry import BackendUnavailable, models_of
from export.config import EngineConfig, OnnxConfig
from export.tensorrt.build import build_engine
from export.to_onnx import export_onnx
from vpr.common.errors import UserError
from vpr.common.hardware import available_cpus
from vpr.data.catalog import Catalog


def test_every_backend_of_every_artifact_is_timed_or_gives_its_reason(
    student_artifact: Path, catalog: Catalog, tmp_path: Path
) -> None:
    fp16 = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp16"), precision="fp16"))
    engine = build_engine(EngineConfig(str(fp16), str(tmp_path / "engine"), target="sm86"))
    assert catalog.artifact is not None
    models = (str(student_artifact), str(fp16), str(engine))
    config = LatencyConfig(models, str(tmp_path / "out"), (1, 8), 0.05, 1, starts=1, arrivals="fixed", rate=200)
    written = measure_latency(replace(config, catalog=str(catalog.artifact.path)))
    rows = json.loads((written / "latency.json").read_text())
    assert set(rows) == {"student (torch)", "fp16 (onnxruntime-cpu)", "fp16 (openvino)", "engine (tensorrt-rtx)"}
    engine_row = rows.pop("engine (tensorrt-rtx)")
    assert engine_row["latency_ms"] is None
    assert "built for sm86" in engine_row["notes"]
    for row in rows.values():
        assert row["cold_start_ms"] > row["load_ms"] + row["first_call_ms"]
        assert row["peak_memory_bytes"] > 20e6
        assert row["gpu_memory_bytes"] is None
        assert row["device_ms"] is None
        assert row["threads"] == 1
        assert row["cpus"] == available_cpus()
        assert row["ceiling"]["dtype"] == "fp32"
        assert row["open_loop"]["calls"] == 10
        assert row["with_preprocess_ms"]["p50"] > row["preprocess_ms"]["p50"]
        for batch in ("1", "8"):
            seen = row["latency_ms"][batch]
            assert 0 < seen["p50"] <= seen["p90"] <= seen["p99"] <= seen["max"]
            # The mean of the calls is between the quickest and the slowest.
            assert row["throughput"][batch] >= 1000 * int(batch) / seen["max"]
            assert 0 < row["of_ceiling"][batch] < 2
    # The runtimes are not weighed down by torch.
    assert rows["fp16 (openvino)"]["peak_memory_bytes"] < rows["student (torch)"]["peak_memory_bytes"] / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "models: none given"),
        ({"batches": (0,)}, "batches:"),
        ({"starts": -1}, "starts: -1"),
        ({"backends": ("tensorflow",)}, "backends: unknown backend 'tensorflow'. Choose from all, torch"),
    ],
)
def test_what_cannot_be_timed_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LatencyConfig(**{"models": ("a",), "output": "b", **changes})


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
