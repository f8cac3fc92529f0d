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


@pytest.mark.slow
def test_every_backend_is_timed_or_gives_its_reason(student_artifact: Path, catalog: Catalog, tmp_path: Path) -> None:
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
            latency = row["latency_ms"][batch]
            assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
            # The mean of the calls is at most the slowest call.
            assert row["throughput"][batch] >= 1000 * int(batch) / latency["max"]
            assert 0 < row["of_ceiling"][batch] < 2
    # The runtimes do not import torch.
    assert rows["fp16 (openvino)"]["peak_memory_bytes"] < rows["student (torch)"]["peak_memory_bytes"] / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "models: expected one or more artifacts, got none"),
        ({"batches": (0,)}, r"batches: expected batch sizes of 1 or more, got \[0\]"),
        ({"starts": -1}, "starts: .*-1"),
        ({"backends": ("tensorflow",)}, "backends: .*tensorflow"),
    ],
)
def test_invalid_latency_config_is_rejected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LatencyConfig(**{"models": ("a",), "output": "b", **changes})


def test_all_backends_give_the_same_embeddings(student_artifact: Path, tmp_path: Path) -> None:
    fp32 = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp32")))
    batch = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    outputs = [model.open(1)(batch) for path in (student_artifact, fp32) for model in models_of(path)]
    assert len(outputs) == 3
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=2e-5)


def test_engine_without_a_gpu_reports_its_target(student_artifact: Path, tmp_path: Path) -> None:
    fp16 = export_onnx(OnnxConfig(str(student_artifact), str(tmp_path / "fp16"), precision="fp16"))
    engine = build_engine(EngineConfig(str(fp16), str(tmp_path / "engine"), target="sm89"))
    (model,) = models_of(engine)
    with pytest.raises(BackendUnavailable, match="built for sm89"):
        model.open(1)
