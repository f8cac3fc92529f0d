from __future__ import annotations

import builtins
import ctypes
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.backends.base import BackendUnavailable
from export.backends.registry import models_of
from export.backends.tensorrt_engine import EngineBackend
from export.tensorrt import cuda_driver as driver_module
from export.tensorrt.bindings import import_tensorrt
from export.tensorrt.compatibility import load_engine
from export.tensorrt.cuda_driver import DriverError, GraphCalls, PyCudaDriver
from export.tensorrt.runner import EngineRunner, open_engine
from tests.export.tensorrt.recorded import DIM, IMAGE, RecordedDriver, Trt, expected
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError

VERSION = "11.4.0.106"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Artifact]:
    """Write an engine artifact with arbitrary bytes as its plan; the double ignores them."""

    def make(targets: tuple[str, ...] = ("sm86",), **config: Any) -> Artifact:
        values = {"onnx": "runs/fp16", "backend": "tensorrt", "builder_version": VERSION, "target": "sm86"}
        values |= {"min_batch": 1, "opt_batch": 4, "max_batch": 8, **config}
        with write_artifact(tmp_path / "engine", "engine", values) as draft:
            (draft.path / "engine.plan").write_bytes(b"plan" * 100)
            draft.metrics = {"precision": "fp16", "targets": list(targets)}
        return load_artifact(tmp_path / "engine")

    return make


def runner(artifact: Artifact, driver: RecordedDriver, graphs: bool = True, **settings: Any) -> EngineRunner:
    return EngineRunner(artifact, Trt(driver, **settings), driver, graphs)


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, *IMAGE)).astype(np.float32)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_batches_of_any_size_stay_in_order(write: Callable[..., Artifact], backend: str, graphs: bool) -> None:
    driver = RecordedDriver()
    with runner(write(backend=backend), driver, graphs, needs_scratch=backend == "tensorrt") as engine:
        for turn in range(4):
            for count in (1, 3, 8, 13, 24):
                batch = images(count, turn)
                embeddings = engine(batch)
                assert embeddings.shape == (count, DIM)
                assert embeddings.dtype == np.float32
                np.testing.assert_allclose(embeddings, expected(batch), rtol=1e-6)
    assert ("launch" in driver.names()) == (graphs and backend == "tensorrt")


def test_uint8_images_are_copied_as_they_are(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver, input_dtype=np.uint8)
    batch = np.random.default_rng(0).integers(0, 256, (11, *IMAGE), dtype=np.uint8)
    np.testing.assert_allclose(engine(batch), expected(batch), rtol=1e-6)
    assert driver.pinned_arrays[0].dtype == np.uint8
    assert ("allocate", 8 * 3 * 4 * 4) in [call[1:] for call in driver.calls]
    with pytest.raises(UserError, match=r"pixels: expected \(n, 3, 4, 4\) uint8 .* float32"):
        engine(images(2))


def test_too_few_images_are_padded_with_the_last(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver, ranges=[(4, 8, 8)])
    batch = images(10)
    np.testing.assert_allclose(engine(batch), expected(batch), rtol=1e-6)
    assert [call[3] for call in driver.calls if call[1] == "copy_in"] == [8, 4]
    np.testing.assert_array_equal(driver.pinned_arrays[0][:4], batch[[8, 9, 9, 9]])


def test_calls_are_ordered_on_one_stream(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver, graphs=False)
    engine(images(11))
    work = [call[1:] for call in driver.calls if call[1] not in ("deserialise", "pinned", "allocate", "context")]
    assert [call[0] for call in work] == [
        "stream",
        *("copy_in", "shape", "enqueue", "copy_out", "synchronise"),
        *("copy_in", "shape", "enqueue", "copy_out", "synchronise"),
    ]
    assert {call[1] for call in work if call[0] != "shape"} == {work[0][1]}
    driver.calls.clear()
    engine(images(3))
    assert driver.names() == ["copy_in", "enqueue", "copy_out", "synchronise"]  # the shape is set already


def test_graph_is_captured_once_per_batch_size(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    artifact = write()
    engine = runner(artifact, driver)
    for count in (3, 5) * 4:
        batch = images(count, count)
        np.testing.assert_allclose(engine(batch), expected(batch), rtol=1e-6)
    names = driver.names()
    assert names.count("capture") == 2
    assert names.count("launch") == 4
    assert names.count("context") == 3  # one for all shapes, and one for each graph
    driver.calls.clear()
    engine(images(3))
    assert driver.names() == ["copy_in", "launch", "copy_out", "synchronise"]
    engine.close()
    assert driver.names().count("discard") == 2
    assert not driver.graphs


def test_number_of_graphs_is_limited(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(max_batch=32), driver, ranges=[(1, 8, 32)])
    for count in list(range(1, 25)) * 3:
        batch = images(count)
        np.testing.assert_allclose(engine(batch), expected(batch), rtol=1e-6)
    assert len(driver.graphs) == 16


def test_contexts_of_a_thread_share_scratch_memory(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    trt = Trt(driver)
    engine = EngineRunner(write(), trt, driver)
    for _ in range(2):
        engine(images(2))
    first, second = trt.engines[0].contexts
    assert first.scratch == second.scratch is not None


def test_failed_capture_only_disables_graphs(
    write: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    driver = RecordedDriver()
    driver.rejects_capture = True
    engine = runner(write(), driver)
    for turn in range(4):
        batch = images(2, turn)
        np.testing.assert_allclose(engine(batch), expected(batch), rtol=1e-6)
    assert driver.names().count("capture") == 1
    assert "warning: engine: continues without CUDA graphs (cuStreamEndCapture" in capsys.readouterr().err


@pytest.mark.parametrize(("graphs", "strategy"), [(True, "WHOLE_GRAPH_CAPTURE"), (False, "DISABLED")])
def test_tensorrt_rtx_captures_graphs_itself(write: Callable[..., Artifact], graphs: bool, strategy: str) -> None:
    driver = RecordedDriver()
    trt = Trt(driver, needs_scratch=False)
    engine = EngineRunner(write(backend="tensorrt-rtx"), trt, driver, graphs)
    for _ in range(3):
        engine(images(2))
    (context,) = trt.engines[0].contexts
    assert context.settings.cuda_graph_strategy == strategy
    assert "capture" not in driver.names()


def test_each_profile_has_its_own_context(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    trt = Trt(driver, ranges=[(1, 1, 2), (4, 8, 8)])
    engine = EngineRunner(write(), trt, driver, graphs=False)
    for count in (1, 8, 2, 10):
        batch = images(count)
        np.testing.assert_allclose(engine(batch), expected(batch), rtol=1e-6)
    assert [context.profile for context in trt.engines[0].contexts] == [0, 1]
    assert driver.names().count("profile") == 1


def test_threads_share_no_state(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver)
    barrier = threading.Barrier(3)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(20):
            barrier.wait()
            batch = images(1 + (seed + turn) % 11, seed)
            if not np.allclose(engine(batch), expected(batch), rtol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(driver.streams) == 3
    for kind, position in (("enqueue", 3), ("copy_in", 2), ("launch", 2)):
        users: dict[int, set[int]] = {}
        for call in driver.calls:
            if call[1] == kind:
                users.setdefault(call[position], set()).add(call[0])
        assert all(len(threads) == 1 for threads in users.values())


def test_new_thread_reuses_buffers_of_ended_thread(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver)
    for _ in range(5):
        thread = threading.Thread(target=engine, args=(images(2),))
        thread.start()
        thread.join()
    assert len(driver.streams) == 1


def test_close_frees_the_buffers_of_every_thread(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    before = driver.free_bytes
    engine = runner(write(), driver)
    for _ in range(3):
        engine(images(2))
    thread = threading.Thread(target=engine, args=(images(2),))
    thread.start()
    thread.join()
    engine.close()
    engine.close()
    assert driver.free_bytes == before
    assert not driver.pinned_arrays
    with pytest.raises(UserError, match="engine: the engine is closed. Open it again."):
        engine(images(1))


def test_close_waits_for_calls_in_progress(write: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver)
    started, may_continue = threading.Event(), threading.Event()
    original, results = driver.synchronise, []

    def slow(stream: Any) -> None:
        started.set()
        assert may_continue.wait(10)
        original(stream)

    monkeypatch.setattr(driver, "synchronise", slow)
    batch = images(2)
    call = threading.Thread(target=lambda: results.append(engine(batch)))
    call.start()
    assert started.wait(10)
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    assert driver.memory
    may_continue.set()
    call.join()
    closing.join()
    np.testing.assert_allclose(results[0], expected(batch), rtol=1e-6)
    assert not driver.memory


def test_unreferenced_engine_is_freed(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver)
    engine(images(2))
    del engine
    gc.collect()
    assert not driver.memory


@pytest.mark.parametrize(
    ("batch", "actual"),
    [
        (np.zeros((2, 3, 5, 4), np.float32), r"\(2, 3, 5, 4\) float32"),
        (np.zeros((3, 4, 4), np.float32), r"\(3, 4, 4\) float32"),
        (np.zeros((2, *IMAGE), np.float64), r"\(2, 3, 4, 4\) float64"),
        (np.zeros((0, *IMAGE), np.float32), r"\(0, 3, 4, 4\) float32"),
        ([[1.0]], "None list"),
    ],
)
def test_wrong_input_is_rejected(write: Callable[..., Artifact], batch: Any, actual: str) -> None:
    engine = runner(write(), RecordedDriver())
    with pytest.raises(
        UserError, match=rf"^pixels: expected \(n, 3, 4, 4\) float32 with n of 1 or more, got {actual}\.$"
    ):
        engine(batch)


REBUILD = r"Rebuild: vpr export engine --onnx runs/fp16 --output \S*engine --backend"


@pytest.mark.parametrize(
    ("config", "targets", "architecture", "message"),
    [
        (
            {"backend": "tensorrt-rtx"},
            ("sm86",),
            "sm89",
            rf"built for sm86, but .* NVIDIA Test \(sm89\)\. {REBUILD} tensorrt-rtx --target sm89 --opt-batch 4",
        ),
        ({"backend": "tensorrt-rtx"}, ("sm80", "sm86"), "sm90", rf"sm80, sm86, .* \(sm90\)\. {REBUILD} tensorrt --opt"),
        (
            {"target": "sm80,sm86,sm89,sm120"},
            ("sm90",),
            "sm86",
            rf"built for sm90, .*\. {REBUILD} tensorrt --opt-batch",
        ),
        (
            {"builder_version": "11.3.0"},
            ("sm86",),
            "sm86",
            rf"tensorrt 11\.3\.0, {VERSION} is installed\. {REBUILD}",
        ),
        (
            {"builder_version": "11.5.0.1", "version_compatible": True},
            ("sm86",),
            "sm86",
            rf"tensorrt 11\.5\.0\.1, {VERSION} is installed\. {REBUILD} .* --version-compatible$",
        ),
        ({"builder_version": "10.12.0", "version_compatible": True}, ("sm86",), "sm86", "built with tensorrt 10"),
        ({"builder_version": "11.3.0", "version_compatible": True}, ("sm86",), "sm86", "allow_host_code=True"),
        ({"weight_stripped": True}, ("sm86",), "sm86", rf"has no weights, .*\. {REBUILD} tensorrt .* --max-batch 8$"),
    ],
)
def test_incompatible_card_is_rejected_before_loading(
    write: Callable[..., Artifact], config: dict[str, Any], targets: tuple[str, ...], architecture: str, message: str
) -> None:
    driver = RecordedDriver(architecture)
    with pytest.raises(UserError, match=message) as raised:
        runner(write(targets, **config), driver)
    assert "\n" not in str(raised.value)
    assert not driver.calls


def test_host_code_is_loaded_if_allowed(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    artifact = write(builder_version="11.3.0", version_compatible=True)
    EngineRunner(artifact, Trt(driver), driver, allow_host_code=True)
    assert driver.calls[0][1:] == ("deserialise", 400, True)


def test_engine_for_an_unknown_gpu_is_tried(write: Callable[..., Artifact]) -> None:
    runner(write(("this GPU",)), RecordedDriver("sm90")).close()


@pytest.mark.parametrize("key", ["load_error", "no_runtime"])
@pytest.mark.parametrize(
    ("logged", "message"),
    [
        (
            "Serialization assertion header.magicTag failed",
            rf"engine\.plan: tensorrt {VERSION} cannot load it \(Seri.*\)\. ",
        ),
        (
            "(cudaError 35: CUDA driver version is insufficient for CUDA runtime version)",
            r"needs a newer driver; this machine's driver supports CUDA 13\.0\. Update the driver, or .*\. ",
        ),
    ],
)
def test_load_failure_gives_tensorrt_reason(
    write: Callable[..., Artifact], logged: str, message: str, key: str
) -> None:
    with pytest.raises(UserError, match=message + REBUILD):
        runner(write(), RecordedDriver(), **{key: logged})


def test_real_runtime_error_is_one_line(write: Callable[..., Artifact]) -> None:
    trt = import_tensorrt("tensorrt-rtx")
    artifact = write(backend="tensorrt-rtx", builder_version=trt.__version__)
    with pytest.raises(UserError, match=rf"(cannot load it|needs a newer driver).*\. {REBUILD} tensorrt-rtx") as raised:
        EngineRunner(artifact, trt, RecordedDriver())
    assert "\n" not in str(raised.value)


def test_damaged_plan_gives_rebuild_command(write: Callable[..., Artifact]) -> None:
    plan = write().path / "engine.plan"
    plan.write_bytes(plan.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"engine\.plan: .*\. {REBUILD} tensorrt"):
        load_engine(plan.parent)
    plan.unlink()
    with pytest.raises(UserError, match=rf"engine\.plan: .*\. {REBUILD} tensorrt"):
        open_engine(plan.parent)


def test_rebuild_command_quotes_paths(write: Callable[..., Artifact]) -> None:
    with pytest.raises(UserError, match="--onnx 'my runs/fp16' --output"):
        runner(write(onnx="my runs/fp16", builder_version="1"), RecordedDriver())


def test_engine_of_another_model_is_rejected(write: Callable[..., Artifact]) -> None:
    with pytest.raises(UserError, match="expected tensors pixels and embedding, got image, logits"):
        runner(write(), RecordedDriver(), tensors=("image", "logits"))


def test_card_without_targets_is_rejected(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "engine", "engine", {"backend": "tensorrt"}) as draft:
        (draft.path / "engine.plan").write_bytes(b"plan")
    with pytest.raises(UserError, match=r"KeyError: 'targets'"):
        runner(load_artifact(tmp_path / "engine"), RecordedDriver())


def test_out_of_memory_suggests_smaller_batches(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver(free_bytes=1000)
    engine = runner(write(max_batch=32, opt_batch=32), driver, ranges=[(1, 32, 32)])
    with pytest.raises(UserError, match=r"too little free memory for batches of 32 .*--opt-batch 16 --max-batch 16$"):
        engine(images(1))
    assert driver.free_bytes == 1000
    assert not driver.pinned_arrays


def test_tensorrt_out_of_memory_has_the_same_message(write: Callable[..., Artifact]) -> None:
    engine = runner(write(), RecordedDriver(), fails="Error Code 1: Cuda Runtime (out of memory)")
    with pytest.raises(UserError, match=r"too little free memory for batches of 8 .*--max-batch 4$"):
        engine(images(1))


def test_failing_engine_gives_tensorrt_reason(write: Callable[..., Artifact]) -> None:
    engine = runner(write(), RecordedDriver(), fails="Error Code 1: Myelin ([exec_instruction.cpp] failed)")
    with pytest.raises(
        UserError,
        match=r"cannot run the engine \(Error Code 1: Myelin .*\)\. Run .* again\. .*rebuild: vpr export engine",
    ):
        engine(images(1))


def test_missing_pycuda_gives_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def import_without_pycuda(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pycuda"):
            raise ImportError("libcuda.so.1: cannot open shared object file")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", import_without_pycuda)
    with pytest.raises(
        UserError, match=r"^pycuda: cannot be loaded \(libcuda.*\)\. Run `pip install -r requirements-gpu\.txt`"
    ):
        PyCudaDriver()


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

        def retain_primary_context(self) -> SimpleNamespace:
            return SimpleNamespace(push=lambda: STACK.append(1), pop=lambda: STACK.pop())


STACK: list[int] = []


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
    monkeypatch.setattr(driver_module.ctypes, "CDLL", lambda name: SimpleNamespace())
    return cuda


def test_pycuda_errors_stay_inside_the_block(fake_cuda: FakeCuda) -> None:
    driver = PyCudaDriver(1)
    assert (driver.gpu.name, driver.gpu.architecture, driver.cuda) == ("NVIDIA L4", "sm89", "CUDA 12.4")
    for error, kind in ((FakeCuda.MemoryError("full"), MemoryError), (FakeCuda.Error("lost"), DriverError)):
        with pytest.raises(kind, match=str(error)), driver.current():
            _fail(error)
        assert not STACK


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


def test_unusable_engine_raises_backend_unavailable(
    write: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = models_of(write().path)
    monkeypatch.setattr(EngineBackend, "missing", lambda self: None)

    def fail(artifact: Artifact) -> None:
        raise UserError(f"{artifact.path}: built for sm86")

    monkeypatch.setattr("export.tensorrt.runner.start_engine", fail)
    with pytest.raises(BackendUnavailable, match="engine: built for sm86"):
        model.open(1)
    monkeypatch.setattr("export.tensorrt.runner.start_engine", lambda artifact: expected)
    assert model.open(1) is expected
