from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.backends.registry import models_of
from export.config import OnnxConfig
from export.to_onnx import export_onnx
from student.embed import EmbedConfig, embed_catalog
from tests.reliability.load import many_threads
from tests.reliability.load.many_threads import Answer, count_differing, measure_hand_off
from vpr.data.catalog import Catalog


@pytest.fixture(scope="module")
def graph(student_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(OnnxConfig(str(student_artifact), str(tmp_path_factory.mktemp("graph") / "fp32"), images=1))


@pytest.mark.parametrize("backend", ["torch", "onnxruntime-cpu", "openvino"])
def test_shared_model_is_thread_safe(student_artifact: Path, graph: Path, backend: str) -> None:
    model = models_of(student_artifact if backend == "torch" else graph, (backend,))[0]
    forward = model.open(1)
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(1, 3, 32, 32)).astype(np.float32) for _ in range(16)]
    expected = [forward(image) for image in images]

    def ask(seed: int) -> list[bool]:
        order = np.random.default_rng(seed).permutation(np.repeat(np.arange(16), 8))
        return [np.array_equal(forward(images[index]), expected[index]) for index in order]

    with ThreadPoolExecutor(16) as threads:
        assert all(all(same) for same in threads.map(ask, range(16)))


def test_hand_off_is_thread_safe(
    student_artifact: Path, graph: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_THREADS": 8, "_IMAGES": 8, "_ROUNDS": 2}.items():
        monkeypatch.setattr(many_threads, name, value)
    assert catalog.artifact is not None
    config = EmbedConfig(str(student_artifact), str(catalog.artifact.path), str(tmp_path / "gallery"), split="test")
    queries = catalog.select(split="test", role="query")
    figures, rows = measure_hand_off(graph, embed_catalog(config), queries, tmp_path, "command")
    assert [(row["runtime"], row["index"], row["answers"]) for row in rows] == [
        (runtime, index, 8 * 8 * 2) for index in ("flat", "hnsw") for runtime in ("ONNX Runtime", "OpenVINO")
    ]
    assert [figure.met for figure in figures] == [True] * 4


def test_swapped_answer_is_counted() -> None:
    sums: list[float] = []

    def answer_late(batch: NDArray[np.float32]) -> Answer:
        sums.append(float(batch.sum()))
        value = sums[-2] if len(sums) == 20 else sums[-1]
        return (np.float64(value).tobytes(), b"", b"")

    batches = [np.full((1, 1), value, np.float32) for value in range(8)]
    assert count_differing(answer_late, batches, threads=1, rounds=4) == 1
