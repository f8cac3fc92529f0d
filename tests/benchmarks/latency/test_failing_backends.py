"""A backend that rejects a model becomes a row with the reason; the other rows are measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.latency import measure as measure_module
from benchmarks.latency.measure import time_models
from benchmarks.recall.measure import _score
from benchmarks.recall.queries import ScoredPart, choose_queries
from export.backends.base import BackendUnavailable, RunFailed
from export.backends.registry import Model
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.gpus import Listing, VisibleGpu
from vpr.data.catalog import Catalog
from vpr.retrieval.config import RerankConfig

GPU = VisibleGpu("NVIDIA H200", "9.0", 143771 << 20, "0")


@dataclass(frozen=True)
class Stub:
    """A backend that fails when it opens (``open``), at each call (``run``), or from a batch size on (``large``)."""

    name: str
    fails: str = ""
    kinds: tuple[str, ...] = ("student",)

    def missing(self) -> None:
        return None

    def version(self) -> str:
        return "1"

    def precision(self, artifact: Artifact) -> str:
        return "fp8"  # of unknown roofline

    def open(self, artifact: Artifact, threads: int) -> Any:
        if self.fails == "open":
            raise BackendUnavailable("no implementation for QuantizeLinear(23)")

        def forward(batch: np.ndarray) -> np.ndarray:
            if self.fails == "run":
                raise RunFailed("student: cannot run it (no kernel image)")
            if self.fails == "large" and len(batch) >= 8:
                raise MemoryError("cuMemAlloc failed: out of memory")
            return np.ones((len(batch), 32), np.float32)

        return forward


@pytest.fixture
def models(student_artifact: Path) -> list[Model]:
    artifact = load_artifact(student_artifact)
    stubs = [Stub("torch"), Stub("onnxruntime-cuda", "open"), Stub("tensorrt", "run"), Stub("torch-cuda", "large")]
    return [Model(artifact, stub) for stub in stubs]


def test_rejected_model_is_a_row_with_its_reason(
    models: list[Model], student_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "models_of", lambda source, backends: models)
    monkeypatch.setattr(measure_module, "list_gpus", lambda: Listing((GPU,), "13.0", "580.1"))
    clocks = iter([{"sm_clock_mhz": 1980, "throttled": []}, {"sm_clock_mhz": 1200, "throttled": ["power cap"]}])
    monkeypatch.setattr(measure_module, "read_clocks", lambda: next(clocks))
    rows = time_models([student_artifact], (1, 8), 0.01, 1, starts=0)
    assert list(rows) == [f"student ({model.backend})" for model in models]
    good, opened, run, large = rows.values()
    assert opened.latency_ms is None
    assert opened.notes == "not run: no implementation for QuantizeLinear(23)"
    assert run.latency_ms is None
    assert run.notes == "not run: student: cannot run it (no kernel image)"
    assert set(good.latency_ms or {}) == {"1", "8"}
    assert good.gpu is None
    assert set(large.latency_ms or {}) == {"1"}
    assert large.notes.startswith("batch 8 not run: there is too little memory")
    assert large.gpu is not None
    assert (large.gpu.name, large.gpu.memory_mib) == ("NVIDIA H200", 143771)
    assert (large.gpu.sm_clock_mhz, large.gpu.throttled) == (1200, ["power cap"])


def test_time_on_the_gpu_that_fails_is_a_note(
    models: list[Model], student_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Model, batches: list[int]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure_module, "models_of", lambda source, backends: models[:1])
    monkeypatch.setattr(measure_module, "measure_device_times", fail)
    (row,) = time_models([student_artifact], (1,), 0.01, 1, starts=0).values()
    assert row.notes == "time on the GPU: not measured (operation not permitted when stream is capturing)"
    assert row.device_ms is None


def test_roofline_that_fails_is_left_out(
    models: list[Model], student_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as on a GPU that this build of PyTorch does not support."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(measure_module, "models_of", lambda source, backends: models[:1])
    monkeypatch.setattr(measure_module, "compute_dtype", lambda model: ("fp16", "cuda"))
    monkeypatch.setattr(measure_module, "measure_roofline", fail)
    (row,) = time_models([student_artifact], (1,), 0.01, 1, starts=0).values()
    assert row.latency_ms
    assert row.of_ceiling is None
    assert "roofline of fp16 on cuda: not measured (CUDA error" in capsys.readouterr().err


@pytest.mark.parametrize("index", [1, 2])
def test_rejected_model_has_no_recall(models: list[Model], index: int, shop_catalog: Catalog) -> None:
    part: ScoredPart = choose_queries(shop_catalog.select(split="test"))
    scored = _score(models[index], part, 0, RerankConfig(), 0)
    assert scored.row.recall_at_1 is None
    assert scored.row.notes.startswith("not run: ")
    assert scored.vectors is None
