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
def test_gpu_has_device_times_and_the_cpu_embeddings(student_artifact: Path) -> None:
    host, device = (models_of(student_artifact, [name])[0] for name in ("torch", "torch-cuda"))
    times = measure_device_times(device, (1, 8))
    assert times is not None
    for row in times.values():
        assert 0 < row["p50"] <= row["p99"] <= row["max"]
        assert row["calls"] == 100
    pixels = host.random_input(3)
    np.testing.assert_allclose(device.open(1)(pixels), host.open(1)(pixels), atol=1e-3)
