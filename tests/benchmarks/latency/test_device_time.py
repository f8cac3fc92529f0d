from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.latency.device_time import measure_device_times
from export.backends.registry import models_of


def test_cpu_backend_has_no_device_time(student_artifact: Path) -> None:
    for name in ("torch", "torch-compile"):
        assert measure_device_times(models_of(student_artifact, [name])[0], (1,)) is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "difference"),
    [("torch-cuda", 1e-5), ("torch-cuda-tf32", 2e-3), ("torch-cuda-bf16", 3e-2), ("torch-cuda-fp16", 5e-3)],
)
def test_gpu_has_device_times_and_the_cpu_embeddings(student_artifact: Path, name: str, difference: float) -> None:
    host, device = (models_of(student_artifact, [name])[0] for name in ("torch", name))
    if reason := device.runner.missing():
        pytest.skip(reason)
    times = measure_device_times(device, (1, 8))
    assert times is not None
    for row in times.values():
        assert 0 < row["p50"] <= row["p99"] <= row["max"]
        assert row["calls"] == 100
    pixels = host.random_input(3)
    np.testing.assert_allclose(device.open(1)(pixels), host.open(1)(pixels), atol=difference)


@pytest.mark.gpu
def test_compiled_network_gives_the_cpu_embeddings_at_each_batch_size(student_artifact: Path) -> None:
    host, device = (models_of(student_artifact, [name])[0] for name in ("torch", "torch-compile-cuda"))
    if reason := device.runner.missing():
        pytest.skip(reason)
    forward, expected = device.open(1), host.open(1)
    for batch in (1, 3, 8, 1):
        pixels = host.random_input(batch)
        np.testing.assert_allclose(forward(pixels), expected(pixels), atol=1e-4)
