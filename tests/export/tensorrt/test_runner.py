from __future__ import annotations

import gc
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.backends.base import BackendUnavailable, RunFailed
from export.backends.registry import models_of
from export.backends.tensorrt_engine import EngineBackend
from export.config import EngineConfig
from export.tensorrt.bindings import import_tensorrt
from export.tensorrt.compatibility import load_engine
from export.tensorrt.runner import EngineRunner, open_engine
from tests.export.tensorrt.recorded import IMAGE, VERSION, RecordedDriver, Trt, expected, images, runner
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.cli import read_config
from vpr.common.errors import UserError


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
    assert 3 <= len(driver.streams) <= 6  # one to compute and one to copy for each thread
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


def test_rejected_host_code_gives_a_command_that_keeps_the_engine(write: Callable[..., Artifact]) -> None:
    artifact = write(version_compatible=True, opt_batch=2)
    with pytest.raises(UserError) as raised:
        runner(artifact, RecordedDriver())
    _, _, command = str(raised.value).rpartition(": ")
    assert command.startswith("vpr export engine --")
    config = read_config(EngineConfig, "export engine", shlex.split(command)[3:])
    assert config.output == f"{artifact.path}-this-version"
    assert not config.version_compatible
    assert (config.onnx, config.backend, config.opt_batch, config.max_batch) == ("runs/fp16", "tensorrt", 2, 8)


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


def test_unusable_engine_raises_backend_unavailable(
    write: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = models_of(write().path)
    monkeypatch.setattr(EngineBackend, "missing", lambda self: None)

    def fail(artifact: Artifact, eager: bool, kernel_cache: str) -> None:
        assert eager
        raise UserError(f"{artifact.path}: built for sm86")

    monkeypatch.setattr("export.tensorrt.runner.start_engine", fail)
    with pytest.raises(BackendUnavailable, match="engine: built for sm86"):
        model.open(1)
    monkeypatch.setattr("export.tensorrt.runner.start_engine", lambda *_, **__: expected)
    np.testing.assert_array_equal(model.open(1)(images(2)), expected(images(2)))

    def lost(batch: Any) -> None:
        raise UserError("engine: the GPU is lost")

    monkeypatch.setattr("export.tensorrt.runner.start_engine", lambda *_, **__: lost)
    with pytest.raises(RunFailed, match="the GPU is lost"):
        model.open(1)(images(2))
