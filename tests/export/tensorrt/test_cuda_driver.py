"""The drivers of PyCUDA (a double) and of cuda-bindings (the real package, on a driver library without a GPU)."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from export.tensorrt import cuda_driver as driver_module
from export.tensorrt.cuda_driver import DriverError, GraphCalls, missing_driver, open_driver
from export.tensorrt.pycuda_driver import PyCudaDriver
from tests.export.tensorrt.fake_driver import build_fake_libcuda, run_with
from vpr.common.errors import UserError


def test_missing_driver_packages_give_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pycuda", "pycuda.driver", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, package, None)
    pattern = r"^cuda: cannot load a CUDA driver package \(pycuda: .*; cuda\.bindings: .*\)\. Run `pip install -r req"
    with pytest.raises(UserError, match=pattern):
        open_driver(7)
    assert 7 not in driver_module._drivers


class FakeCuda(ModuleType):
    """The used part of ``pycuda.driver``, with its exception classes."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    class Device:
        def __init__(self, index: int) -> None:
            pass

        count = staticmethod(lambda: 2)

        def name(self) -> str:
            return "NVIDIA L4"

        def compute_capability(self) -> tuple[int, int]:
            return 8, 9

        def retain_primary_context(self) -> PrimaryContext:
            CONTEXTS.append(weakref.ref(context := PrimaryContext()))
            return context


STACK: list[int] = []
CONTEXTS: list[weakref.ref[PrimaryContext]] = []


class PrimaryContext:
    """PyCUDA's object of the primary context; destroying it would detach the context of the whole process."""

    fails = False

    def push(self) -> None:
        if self.fails:
            raise FakeCuda.Error("cuCtxPushCurrent failed: context is destroyed")
        STACK.append(1)

    def pop(self) -> None:
        STACK.pop()


def _fail(error: Exception) -> None:
    assert len(STACK) == 1
    raise error


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda("pycuda.driver")
    cuda.init = lambda: None  # type: ignore[attr-defined]
    cuda.get_driver_version = lambda: 12040  # type: ignore[attr-defined]
    package = ModuleType("pycuda")
    package.driver = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", cuda)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    monkeypatch.setattr(driver_module, "_drivers", {})
    return cuda


def test_pycuda_errors_stay_inside_the_block(fake_cuda: FakeCuda) -> None:
    driver = PyCudaDriver(1)
    assert (driver.gpu.name, driver.gpu.architecture, driver.cuda) == ("NVIDIA L4", "sm89", "CUDA 12.4")
    for error, kind in ((FakeCuda.MemoryError("full"), MemoryError), (FakeCuda.Error("lost"), DriverError)):
        with pytest.raises(kind, match=str(error)), driver.current():
            _fail(error)
        assert not STACK


def test_failing_push_is_an_error_inside_the_block(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = PyCudaDriver(1)
    monkeypatch.setattr(PrimaryContext, "fails", True)
    with pytest.raises(DriverError, match="context is destroyed"), driver.current():
        pytest.fail("the block ran without a context")
    assert not STACK


def test_driver_of_a_gpu_is_one_for_the_process(fake_cuda: FakeCuda) -> None:
    CONTEXTS.clear()
    first = open_driver(1)
    assert open_driver(1) is first
    assert isinstance(first, PyCudaDriver)
    assert open_driver(0) is not first
    assert len(CONTEXTS) == 2
    # PyCUDA detaches the context wrongly when its object is destroyed, so nothing may ever destroy it.
    driver_module._drivers.clear()
    del first
    gc.collect()
    assert all(context() is not None for context in CONTEXTS)


def test_missing_gpu_or_driver_is_an_error(fake_cuda: FakeCuda) -> None:
    with pytest.raises(UserError, match="device: expected 0 to 1 on this machine, got 2"):
        PyCudaDriver(2)

    def fail() -> None:
        raise FakeCuda.Error("cuInit failed: no CUDA-capable device is detected")

    fake_cuda.init = fail  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"device: CUDA cannot use GPU 0 \(cuInit failed: no CUDA-capable"):
        PyCudaDriver()


class Library:
    """The graph calls of ``libcuda``; ``fails`` names the call that returns an error."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
            elif name in ("cuStreamEndCapture", "cuGraphInstantiateWithFlags") and name != self.fails:
                ctypes.cast(arguments[name == "cuStreamEndCapture"], ctypes.POINTER(ctypes.c_void_p))[0] = 77
            return 901 if name == self.fails else 0

        return call


def test_driver_graph_calls_are_ordered() -> None:
    library = Library()
    calls = GraphCalls(library)
    graph = calls.capture(5, lambda: library.calls.append("enqueue") is None)
    assert graph == 77
    calls.launch(graph, 5)
    calls.discard(graph)
    assert library.calls == [
        *("cuStreamBeginCapture_v2", "enqueue", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"),
        *("cuGraphDestroy", "cuGraphLaunch", "cuGraphExecDestroy"),
    ]


def test_failed_capture_is_ended() -> None:
    for library, enqueue, message in (
        (Library(), lambda: False, "the engine cannot be captured"),
        (Library("cuStreamEndCapture"), lambda: True, r"cuStreamEndCapture: CUDA_ERROR_STREAM_\w+ \(901\)"),
    ):
        with pytest.raises(DriverError, match=message):
            GraphCalls(library).capture(5, enqueue)
        assert "cuStreamEndCapture" in library.calls
        assert "cuGraphInstantiateWithFlags" not in library.calls


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("cuda.bindings.driver")
    return build_fake_libcuda(tmp_path_factory.mktemp("libcuda"))


USE_EVERY_CALL = """
import numpy as np
from export.tensorrt.cuda_driver import open_driver

driver = open_driver(1)
assert open_driver(1) is driver
print(type(driver).__name__, driver.device, driver.gpu.name, driver.gpu.architecture, driver.cuda)
batch = np.arange(12, dtype=np.float32).reshape(4, 3)
with driver.current():
    stream, copies, event = driver.stream(), driver.stream(), driver.event()
    host, first, second = driver.pinned((4, 3)), driver.allocate(batch.nbytes), driver.allocate(batch.nbytes)
    driver.copy_in(int(first), batch, copies)
    driver.record(event, copies)
    driver.wait(stream, event)
    driver.copy_on_device(int(second), int(first), batch.nbytes, stream)
    driver.copy_out(host, int(second), stream)
    driver.synchronise(stream)
    np.testing.assert_array_equal(host, batch)
    end = driver.event()
    driver.record(end, stream)
    driver.wait_on_host(end)
    print(driver.milliseconds(event, end), driver.memory())
    graph = driver.capture(stream, lambda: True)
    driver.launch(graph, stream)
    driver.discard(graph)
    for memory in (host, first, second):
        driver.free(memory)
    for item in (event, end, stream, copies):
        driver.destroy(item)
"""


def test_every_call_of_cuda_bindings_works(libcuda: Path, tmp_path: Path) -> None:
    """The package's own binding layer calls a library whose prototypes the compiler has checked."""
    log = tmp_path / "log"
    gpus = "NVIDIA A100:8:0:40960,NVIDIA H200:9:0:143771"
    child = run_with(libcuda, USE_EVERY_CALL, FAKE_CUDA_GPUS=gpus, FAKE_CUDA_LOG=str(log))
    assert child.returncode == 0, child.stderr
    first, second = child.stdout.splitlines()
    assert first == "CudaBindingsDriver 1 NVIDIA H200 sm90 CUDA 13.0"
    assert second == f"2.5 ({1 << 20}, {40960 << 20})"
    calls = [line.split()[0] for line in log.read_text().splitlines()]
    assert calls.count("cuDevicePrimaryCtxRetain") == 1
    for make, release, count in (
        ("cuMemAlloc_v2", "cuMemFree_v2", 2),
        ("cuMemHostAlloc", "cuMemFreeHost", 1),
        ("cuStreamCreate", "cuStreamDestroy_v2", 2),
        ("cuEventCreate", "cuEventDestroy_v2", 2),
        ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", 1),
        ("cuGraphInstantiateWithFlags", "cuGraphExecDestroy", 1),
    ):
        assert calls.count(make) == calls.count(release) == count, make


@pytest.mark.parametrize(
    ("fails", "status", "printed"),
    [
        ("cuMemAlloc_v2", "2", "MemoryError cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2)"),
        ("cuMemAlloc_v2", "999", "DriverError cuMemAlloc: CUDA_ERROR_UNKNOWN (999)"),
        ("cuCtxPushCurrent_v2", "999", "DriverError cuCtxPushCurrent: CUDA_ERROR_UNKNOWN (999)"),
        ("cuInit", "100", "UserError device: CUDA cannot use GPU 0 (cuInit: CUDA_ERROR_NO_DEVICE (100)). Check"),
    ],
)
def test_failing_call_of_cuda_bindings_is_named(libcuda: Path, fails: str, status: str, printed: str) -> None:
    code = """
from export.tensorrt.cuda_driver import open_driver
try:
    driver = open_driver()
    with driver.current():
        driver.allocate(10)
except Exception as error:
    print(type(error).__name__, error)
"""
    child = run_with(libcuda, code, FAKE_CUDA_FAILS=fails, FAKE_CUDA_STATUS=status)
    assert child.stdout.startswith(printed), child.stdout + child.stderr


def test_missing_gpu_is_an_error_with_cuda_bindings(libcuda: Path) -> None:
    code = "from export.tensorrt.cuda_driver import open_driver; open_driver(4)"
    child = run_with(libcuda, code)
    assert "UserError: device: expected 0 to 0 on this machine, got 4." in child.stderr


def test_machine_without_a_driver_gives_one_line(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    code = """
from export.tensorrt.cuda_bindings_driver import CudaBindingsDriver
try:
    CudaBindingsDriver()
except Exception as error:
    print(type(error).__name__, error)
"""
    child = run_with(tmp_path / "libcuda.so.1", code)
    assert child.stdout.startswith("UserError device: CUDA cannot use GPU 0 ("), child.stdout + child.stderr
    assert child.stdout.count("\n") == 1


def test_pycuda_is_preferred(fake_cuda: FakeCuda) -> None:
    assert missing_driver() is None
    assert isinstance(open_driver(0), PyCudaDriver)
