from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.latency.device_time import device_times
from export.backends.registry import models_of


def test_a_backend_without_events_has_no_device_time(student_artifact: Path) -> None:
    for name in ("torch", "torch-compile"):
        assert device_times(models_of(student_artifact, [name])[0], (1,)) is None


@pytest.mark.gpu
def test_a_gpu_s_own_time_is_measured_and_its_embeddings_are_the_cpu_s(student_artifact: Path) -> None:
    host, device = (models_of(student_artifact, [name])[0] for name in ("torch", "torch-cuda"))
    found = device_times(device, (1, 8))
    assert found is not None
    for row in found.values():
        assert 0 < row["p50"] <= row["p99"] <= row["max"]
        assert row["calls"] == 100
    pixels = host.random_input(3)
    np.testing.assert_allclose(device.open(1)(pixels), host.open(1)(pixels), atol=1e-3)
