"""Engines on a real GPU: ``make test-gpu``, or ``python -m pytest -m gpu`` with all packages installed."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.config import TARGETS, EngineConfig, OnnxConfig
from export.tensorrt.cuda_driver import open_driver
from export.tensorrt.runner import open_engine
from vpr.common.errors import UserError

pytestmark = pytest.mark.gpu
MAX_BATCH = 8


def _architecture() -> str:
    try:
        return open_driver().gpu.architecture
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=["tensorrt", "tensorrt-rtx"])
def built(
    request: pytest.FixtureRequest, student_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """An FP16 graph and its engine for this machine's GPU, by each builder that supports the GPU."""
    from export.tensorrt.build import build_engine
    from export.to_onnx import export_onnx

    architecture, backend = _architecture(), request.param
    if backend == "tensorrt":
        try:
            importlib.import_module("tensorrt")
        except ImportError as error:
            pytest.skip(f"tensorrt cannot be loaded: {error}")
    elif architecture not in TARGETS:
        pytest.skip(f"TensorRT-RTX has no ahead-of-time target {architecture}")
    folder = tmp_path_factory.mktemp(backend)
    graph = export_onnx(OnnxConfig(str(student_artifact), str(folder / "fp16"), precision="fp16"))
    options = {"target": architecture} if backend == "tensorrt-rtx" else {}
    config = EngineConfig(
        str(graph), str(folder / "engine"), backend=backend, max_batch=MAX_BATCH, batches=(3,), **options
    )
    return graph, build_engine(config)


def _images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, 3, 32, 32)).astype(np.float32)


def _reference(built: tuple[Path, Path]) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return the graph as ONNX Runtime computes it on the CPU."""
    from export.to_onnx import load_onnx, run_graph

    graph = load_onnx(built[0])[0]
    return lambda batch: run_graph(graph, batch)


def _min_cosine(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((actual * expected).sum(axis=1) / lengths).min())


@pytest.mark.parametrize("graphs", [True, False])
def test_engine_embeds_like_the_graph(built: tuple[Path, Path], graphs: bool) -> None:
    graph = _reference(built)
    with open_engine(built[1], graphs=graphs) as engine:
        for turn in range(4):  # plain, captured, replayed, replayed
            for count in (1, 3, MAX_BATCH, MAX_BATCH + 5):
                batch = _images(count, turn)
                embeddings = engine(batch)
                assert embeddings.shape == (count, 32)
                assert _min_cosine(embeddings, graph(batch)) > 0.999


@pytest.mark.parametrize("graphs", [True, False])
def test_two_threads_get_correct_results(built: tuple[Path, Path], graphs: bool) -> None:
    graph = _reference(built)
    batches = [_images(MAX_BATCH + 5, seed) for seed in range(2)]
    expected = [graph(batch) for batch in batches]
    worst = [0.0, 0.0]
    with open_engine(built[1], graphs=graphs) as engine:

        def work(index: int) -> None:
            worst[index] = min(_min_cosine(engine(batches[index]), expected[index]) for _ in range(50))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert min(worst) > 0.999


def test_graphs_are_captured_without_warning(built: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with open_engine(built[1]) as engine:
        for _ in range(3):
            engine(_images(2))
    assert "without CUDA graphs" not in capsys.readouterr().err


def test_next_start_accepts_the_compiled_kernels(
    built: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, batch = _reference(built), _images(MAX_BATCH)
    for _ in range(2):
        with open_engine(built[1], eager=True, kernel_cache=tmp_path / "kernels") as engine:
            assert _min_cosine(engine(batch), reference(batch)) > 0.999
    assert (tmp_path / "kernels").is_file() == (built[1].parent.name.startswith("tensorrt-rtx"))
    assert "compiled again" not in capsys.readouterr().err


def test_memory_is_freed(built: tuple[Path, Path]) -> None:
    driver = open_driver()
    free = []
    for _ in range(6):
        with open_engine(built[1]) as engine:
            for _ in range(3):
                engine(_images(MAX_BATCH))
        with driver.current():
            free.append(driver.memory()[0])
    assert free[1] - free[-1] < 16 << 20


def test_tensors_of_pytorch_are_embedded_on_the_device(built: tuple[Path, Path]) -> None:
    torch = pytest.importorskip("torch")
    reference = _reference(built)
    with open_engine(built[1]) as engine:
        for count in (1, 3, MAX_BATCH + 5, 3, 3):
            batch = _images(count, count)
            embeddings = torch.zeros(count, 32, device="cuda")
            engine.embed_on_device(torch.from_numpy(batch).cuda(), embeddings)
            assert _min_cosine(embeddings.cpu().numpy(), reference(batch)) > 0.999


def test_time_on_the_device_is_shorter_than_that_of_a_call(built: tuple[Path, Path]) -> None:
    with open_engine(built[1], eager=True) as engine:
        batch = _images(MAX_BATCH)
        times = engine.measure_on_device(MAX_BATCH, 20)
        start = time.perf_counter()
        for _ in range(20):
            engine(batch)
        assert 0 < np.median(times) < 1000 * (time.perf_counter() - start) / 20


def test_driver_copies_and_orders_work_without_tensorrt() -> None:
    """Contexts, page-locked copies, events and the capture of a copy, by the driver package that is installed."""
    driver = open_driver()
    batch = np.arange(1 << 16, dtype=np.float32).reshape(256, 256)
    with driver.current():
        stream, copies, loaded = driver.stream(), driver.stream(), driver.event()
        host, first, second = driver.pinned(batch.shape), driver.allocate(batch.nbytes), driver.allocate(batch.nbytes)
        driver.copy_in(int(first), batch, copies)
        driver.record(loaded, copies)
        driver.wait(stream, loaded)

        def copy() -> bool:
            driver.copy_on_device(int(second), int(first), batch.nbytes, stream)
            return True

        graph = driver.capture(stream, copy)
        driver.launch(graph, stream)
        driver.copy_out(host, int(second), stream)
        driver.synchronise(stream)
        np.testing.assert_array_equal(host, batch)
        driver.discard(graph)
        for memory in (host, first, second):
            driver.free(memory)
        for item in (loaded, stream, copies):
            driver.destroy(item)
