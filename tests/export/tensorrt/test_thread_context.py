"""How a thread runs batches: order, overlap, graphs, profiles, kernels and tensors that are on the GPU already."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.tensorrt import dlpack
from export.tensorrt.runner import EngineRunner
from tests.export.tensorrt.recorded import DIM, IMAGE, Event, RecordedDriver, Stream, Trt, expected, images, runner
from vpr.artifacts.store import Artifact
from vpr.common.errors import UserError


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
    assert {source.dtype for source in driver.sources} == {np.dtype(np.uint8)}
    assert ("allocate", 8 * 3 * 4 * 4) in [call[1:] for call in driver.calls]
    with pytest.raises(UserError, match=r"pixels: expected \(n, 3, 4, 4\) uint8 .* float32"):
        engine(images(2))


def test_uint8_tensors_on_the_device_are_embedded(write: Callable[..., Artifact]) -> None:
    engine = runner(write(), RecordedDriver(), input_dtype=np.uint8)
    batch = np.random.default_rng(0).integers(0, 256, (5, *IMAGE), dtype=np.uint8)
    embeddings = np.zeros((5, DIM), np.float32)
    engine.embed_on_device(GpuTensor(batch), GpuTensor(embeddings))
    np.testing.assert_allclose(embeddings, expected(batch), rtol=1e-6)
    with pytest.raises(UserError, match="pixels: expected contiguous uint8 values"):
        engine.embed_on_device(GpuTensor(images(5)), GpuTensor(embeddings))


def test_too_few_images_are_padded_with_the_last(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver, ranges=[(4, 8, 8)])
    batch = images(10)
    np.testing.assert_allclose(engine(batch), expected(batch), rtol=1e-6)
    assert [call[3] for call in driver.calls if call[1] == "copy_in"] == [8, 4]
    np.testing.assert_array_equal(driver.sources[1], batch[[8, 9, 9, 9]])


def test_batch_of_one_chunk_uses_one_stream(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver, graphs=False)
    engine(images(7))
    setup = ("deserialise", "pinned", "allocate", "context", "event")
    work = [call[1:] for call in driver.calls if call[1] not in setup]
    assert [call[0] for call in work] == ["stream", "copy_in", "shape", "enqueue", "copy_out", "synchronise"]
    assert {call[1] for call in work if call[0] != "shape"} == {work[0][1]}
    driver.calls.clear()
    engine(images(7))
    assert driver.names() == ["copy_in", "enqueue", "copy_out", "synchronise"]  # the shape is set already


@pytest.mark.parametrize("graphs", [True, False])
def test_copies_and_kernels_of_a_large_batch_overlap(write: Callable[..., Artifact], graphs: bool) -> None:
    """In series, 8 chunks would take 8 times copy, kernels and copy of the result."""
    driver = RecordedDriver()
    engine = runner(write(), driver, graphs)
    batch = images(64)
    for _ in range(4):
        start, _ = driver.clock, driver.calls.clear()
        np.testing.assert_allclose(engine(batch), expected(batch), rtol=1e-6)
    copy_in, kernels, copy_out = driver.costs.values()
    series = 8 * (copy_in + kernels + copy_out)
    assert driver.clock - start == pytest.approx(copy_in + 8 * (kernels + copy_out))
    assert driver.clock - start < 0.7 * series
    # The images of a chunk are on their way before the host waits for the result of the one before.
    names = [name for name in driver.names() if name in ("copy_in", "wait_on_host")]
    assert names == ["copy_in"] * 2 + ["wait_on_host", "copy_in"] * 6 + ["wait_on_host"] * 2
    streams = {name: {call[2] for call in driver.calls if call[1] == name} for name in ("copy_in", "copy_out")}
    assert len(streams["copy_in"] | streams["copy_out"]) == 2


@pytest.mark.parametrize("eager_copies", [False, True])
@pytest.mark.parametrize("count", [9, 16, 17, 24, 40])
def test_no_slot_is_overwritten_or_read_too_early(
    write: Callable[..., Artifact], count: int, eager_copies: bool
) -> None:
    driver = RecordedDriver(eager_copies=eager_copies)
    engine = runner(write(), driver)
    for turn in range(4):
        batch = images(count, turn)
        np.testing.assert_allclose(engine(batch), expected(batch), rtol=1e-6)


def test_contiguous_images_are_copied_from_the_callers_memory(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver)
    batch = images(19)
    engine(batch)
    assert all(np.shares_memory(source, batch) for source in driver.sources)
    driver.sources.clear()
    strided = np.repeat(batch, 2, axis=3)[..., ::2]
    np.testing.assert_allclose(engine(strided), expected(batch), rtol=1e-6)
    assert not any(np.shares_memory(source, strided) for source in driver.sources)


def test_second_slot_is_allocated_when_it_is_needed(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver)
    engine(images(8))
    one = (1 << 30) - driver.free_bytes
    engine(images(9))
    slot = 8 * 4 * (3 * 4 * 4 + DIM)
    assert (1 << 30) - driver.free_bytes == one + slot


def test_second_slot_that_does_not_fit_leaves_nothing(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver(free_bytes=3000)  # enough for one slot of 1,696 bytes
    engine = runner(write(), driver)
    engine(images(8))
    free, pinned = driver.free_bytes, len(driver.pinned_arrays)
    for _ in range(3):
        with pytest.raises(UserError, match="too little free memory for batches of 8"):
            engine(images(9))
    assert (driver.free_bytes, len(driver.pinned_arrays)) == (free, pinned)
    np.testing.assert_allclose(engine(images(7)), expected(images(7)), rtol=1e-6)


def test_error_waits_for_work_on_the_callers_memory(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    trt = Trt(driver)
    engine = EngineRunner(write(), trt, driver)
    engine(images(20))
    trt.engines[0].fails = "Error Code 1: Cuda Runtime (launch failure)"
    driver.calls.clear()
    with pytest.raises(UserError, match="cannot run the engine"):
        engine(images(24))
    assert driver.names()[-2:] == ["synchronise", "synchronise"]


class GpuTensor:
    """Memory of another library: an array whose address stands for one of the GPU."""

    def __init__(self, array: NDArray[Any], device: int = 0, kind: int = 2) -> None:
        self.array, self.device, self.kind = array, device, kind
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, self.device

    def __dlpack__(self, stream: int) -> Any:
        self.streams.append(stream)
        capsule = self.array.__dlpack__()
        dlpack._tensor_of(capsule).device_id = self.device
        return capsule


@pytest.mark.parametrize("count", [1, 5, 8, 13, 24])
def test_device_tensors_are_embedded_without_the_host(write: Callable[..., Artifact], count: int) -> None:
    driver = RecordedDriver()
    engine = runner(write(), driver, ranges=[(2, 4, 8)])
    for turn in range(4):
        batch, embeddings = images(count, turn), np.zeros((count, DIM), np.float32)
        pixels, target = GpuTensor(batch), GpuTensor(embeddings)
        engine.embed_on_device(pixels, target)
        np.testing.assert_allclose(embeddings, expected(batch), rtol=1e-6)
        compute = next(call[2] for call in driver.calls if call[1] == "copy_on_device")
        assert pixels.streams == target.streams == [compute]
    assert not {"copy_in", "copy_out"} & set(driver.names())
    assert "launch" in driver.names()


@pytest.mark.parametrize(
    ("pixels", "target", "message"),
    [
        (images(2), GpuTensor(np.zeros((2, DIM), np.float32)), "pixels: expected a tensor in GPU memory .*got ndarray"),
        (GpuTensor(images(2), kind=1), None, "pixels: expected a tensor in GPU memory .*got GpuTensor"),
        (GpuTensor(images(2), device=1), None, "pixels: expected a tensor of GPU 0, got one of GPU 1"),
        (GpuTensor(images(2).astype(np.float64)), None, "pixels: expected contiguous float32 values"),
        (GpuTensor(images(4)[::2]), None, "pixels: expected contiguous float32 values"),
        (GpuTensor(images(2)[:, :2].copy()), None, r"pixels: expected \(2, 3, 4, 4\) .*got \(2, 2, 4, 4\)"),
        (
            GpuTensor(images(2)),
            GpuTensor(np.zeros((3, DIM), np.float32)),
            r"embedding: expected \(2, 5\) .*got \(3, 5\)",
        ),
    ],
)
def test_wrong_device_tensor_is_rejected(
    write: Callable[..., Artifact], pixels: Any, target: Any, message: str
) -> None:
    engine = runner(write(), RecordedDriver())
    with pytest.raises(UserError, match=message):
        engine.embed_on_device(pixels, target or GpuTensor(np.zeros((2, DIM), np.float32)))


def test_dlpack_of_pytorch_is_read() -> None:
    import torch

    tensor = torch.arange(24.0).reshape(2, 3, 4)[1:]
    capsules = tensor.__dlpack__(), tensor.transpose(1, 2).__dlpack__()
    read, turned = (dlpack._tensor_of(capsule) for capsule in capsules)
    assert (read.data or 0) + read.byte_offset == tensor.data_ptr()
    assert [read.shape[axis] for axis in range(read.ndim)] == [1, 3, 4]
    assert (read.code, read.bits, read.lanes) == (2, 32, 1)
    assert dlpack._is_contiguous(read, (1, 3, 4))
    assert not dlpack._is_contiguous(turned, (1, 4, 3))


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_time_on_the_device_leaves_copies_out(write: Callable[..., Artifact], backend: str) -> None:
    driver = RecordedDriver()
    engine = runner(write(backend=backend), driver, needs_scratch=backend == "tensorrt")
    for batch, chunks in ((1, 1), (8, 1), (20, 3)):
        np.testing.assert_allclose(engine.measure_on_device(batch, 5), [chunks * driver.costs["kernels"]] * 5)
    before = len(driver.destroyed)
    assert before == 2 * 3
    engine.close()
    assert all(isinstance(item, (Stream, Event)) for item in driver.destroyed)
    assert len({id(item) for item in driver.destroyed}) == driver.names().count("event") + len(driver.streams)


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
    assert context.settings.dynamic_shapes_kernel_specialization_strategy == "LAZY"
    assert "capture" not in driver.names()


def test_each_profile_has_its_own_context(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    trt = Trt(driver, ranges=[(1, 1, 2), (4, 8, 8)])
    engine = EngineRunner(write(), trt, driver, graphs=False)
    for count in (1, 8, 2, 10):
        batch = images(count)
        np.testing.assert_allclose(engine(batch), expected(batch), rtol=1e-6)
    # The last batch has a chunk of 8 in the first slot, and one of 2 in the second slot.
    assert [context.profile for context in trt.engines[0].contexts] == [0, 1, 0]
    assert driver.names().count("profile") == 1


def test_profile_that_cannot_be_selected_is_an_error(write: Callable[..., Artifact]) -> None:
    engine = runner(write(), RecordedDriver(), ranges=[(1, 1, 2), (4, 8, 8)], rejects_profile=True)
    engine(images(1))
    with pytest.raises(UserError, match="engine: cannot select optimisation profile 1 .*Run the command again"):
        engine(images(8))


def test_benchmarked_batch_runs_in_its_own_profile(write: Callable[..., Artifact]) -> None:
    driver = RecordedDriver()
    trt = Trt(driver, ranges=[(1, 8, 32), (1, 1, 1), (8, 8, 8), (32, 32, 32)])
    engine = EngineRunner(write(batches=[1, 8, 32]), trt, driver, graphs=False)
    for count in (1, 8, 32, 5):
        engine(images(count))
    assert [context.profile for context in trt.engines[0].contexts] == [1, 2, 3, 0]


def test_compiled_kernels_are_shared_and_kept(
    write: Callable[..., Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kernels" / "engine.bin"
    artifact = write(backend="tensorrt-rtx")
    for content, expected_content in ((None, b"rtx:"), (b"rtx:kernels", b"rtx:kernels"), (b"other version", b"rtx:")):
        if content is not None:
            file.write_bytes(content)
        driver = RecordedDriver()
        trt = Trt(driver, needs_scratch=False)
        with EngineRunner(artifact, trt, driver, eager=True, kernel_cache=file) as engine:
            engine(images(2))
            thread = threading.Thread(target=engine, args=(images(9),))
            thread.start()
            thread.join()
            contexts = trt.engines[0].contexts
            assert len(contexts) == 3
            assert len({id(context.settings.cache) for context in contexts}) == 1
            assert {context.settings.dynamic_shapes_kernel_specialization_strategy for context in contexts} == {"EAGER"}
        assert file.read_bytes() == expected_content
    assert "kernels of another GPU or version, compiled again" in capsys.readouterr().err
