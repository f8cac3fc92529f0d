"""Test of a CUDA driver package without TensorRT: contexts, pinned copies, events, and the capture of a copy."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from experiments.figures import Figure, Row
from experiments.gpu_check.latency import COMMAND, Skipped
from vpr.common.errors import UserError

_VALUES = 16 << 20  # of a copy: 64 MiB of float32
_CLASSES = {
    "pycuda": (("export.tensorrt.pycuda_driver", "export.tensorrt.cuda_driver"), "PyCudaDriver"),
    "cuda-bindings": (("export.tensorrt.cuda_bindings_driver",), "CudaBindingsDriver"),
}
_drivers: dict[str, Any] = {}  # one for the life of the process: dropping one may detach the context of PyTorch


def open_driver(package: str) -> Any:
    """Return the toolkit's driver of GPU 0 by a package.

    Raises:
        Skipped: The package is not installed, or the toolkit has no driver by it.
    """
    if package not in _drivers:
        modules, name = _CLASSES[package]
        found = [module for module in modules if importlib.util.find_spec(module) is not None]
        kind = next((k for m in found if (k := getattr(importlib.import_module(m), name, None))), None)
        if kind is None:
            raise Skipped(f"the toolkit has no driver by {package}")
        try:
            _drivers[package] = kind(0)
        except (UserError, ImportError) as error:
            raise Skipped(str(error)) from None
    return _drivers[package]


def check_driver(package: str, is_rehearsal: bool = False) -> Iterator[tuple[list[Figure], dict[str, list[Row]]]]:
    """Yield the number of checks that a driver passes, a row for each, and its bandwidth."""
    torch.ones(1, device="cuda").sum().item()  # PyTorch has the primary context first, as in the toolkit's reports
    driver = open_driver(package)
    rows, figures = list[Row](), list[Figure]()
    for check in (copy_pinned, copy_in_thread, time_by_events, replay_captured_copy, share_context):
        try:
            figures += check(driver)
            outcome = "passed"
        except Skipped as reason:
            outcome = f"skipped: {reason}"
        except Exception as error:  # a failed check is a result
            outcome = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rows.append({"driver": package, "check": (check.__doc__ or "").splitlines()[0], "outcome": outcome})
    failed = sum(row["outcome"].startswith("failed") for row in rows)
    figures.append(Figure(f"{package} driver: failed checks", float(failed), "", 0.0, "<=", COMMAND))
    yield figures, {f"gpu-check-driver-{package}": rows}


def copy_pinned(driver: Any) -> list[Figure]:
    """Copy pinned memory to the GPU and back."""
    with _Buffers(driver) as buffers:
        buffers.host_in[:] = np.arange(_VALUES, dtype=np.float32)
        buffers.copy_through()
        driver.synchronise(buffers.stream)
        np.testing.assert_array_equal(buffers.host_out, buffers.host_in)
    return []


def copy_in_thread(driver: Any) -> list[Figure]:
    """Copy in another thread, whose context ends with its block."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            copy_pinned(driver)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return []


def time_by_events(driver: Any) -> list[Figure]:
    """Time copies by events."""
    if not hasattr(driver, "event"):
        raise Skipped("this driver has no events")
    with _Buffers(driver) as buffers:
        buffers.copy_through()
        begin, end = driver.event(), driver.event()
        driver.record(begin, buffers.stream)
        driver.copy_in(buffers.address, buffers.host_in, buffers.stream)
        driver.record(end, buffers.stream)
        driver.wait_on_host(end)
        milliseconds = driver.milliseconds(begin, end)
    assert milliseconds > 0, milliseconds
    name = f"{type(driver).__name__}: copy of 64 MiB of pinned memory to the GPU"
    return [Figure(name, 4 * _VALUES / milliseconds / 1e6, "GB/s", None, ">=", COMMAND)]


def replay_captured_copy(driver: Any) -> list[Figure]:
    """Capture copies as a graph, and replay it on other values."""
    with _Buffers(driver) as buffers:
        buffers.host_in[:], buffers.host_out[:] = 1, 0
        graph = driver.capture(buffers.stream, buffers.copy_through)
        assert not buffers.host_out.any(), "the capture ran the copies"
        for value in (2, 3):
            buffers.host_in[:] = value
            driver.launch(graph, buffers.stream)
            driver.synchronise(buffers.stream)
            assert (buffers.host_out == value).all(), f"the replay copied {buffers.host_out[0]}, expected {value}"
        driver.discard(graph)
    return []


def share_context(driver: Any) -> list[Figure]:
    """Leave PyTorch's context as it was."""
    total = torch.arange(1000, device="cuda").sum()
    with driver.current():
        inside = torch.arange(1000, device="cuda").sum()
    assert int(total) == int(inside) == int(torch.arange(1000, device="cuda").sum()) == 499500
    return []


class _Buffers:
    """Stream, two pinned arrays and device memory of a driver, inside a block in which the GPU is current."""

    def __init__(self, driver: Any) -> None:
        self._driver, self._current = driver, driver.current()

    def __enter__(self) -> _Buffers:
        self._current.__enter__()
        driver = self._driver
        self.stream = driver.stream()
        self.host_in, self.host_out = driver.pinned((_VALUES,)), driver.pinned((_VALUES,))
        self._memory = driver.allocate(4 * _VALUES)
        self.address = int(self._memory)
        return self

    def copy_through(self) -> bool:
        """Enqueue a copy to the device and one back."""
        self._driver.copy_in(self.address, self.host_in, self.stream)
        self._driver.copy_out(self.host_out, self.address, self.stream)
        return True

    def __exit__(self, *error: Any) -> None:
        release: Callable[[Any], None] = self._driver.free
        for memory in (self._memory, self.host_in, self.host_out):
            release(memory)
        self._current.__exit__(*error)
