from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from onnx import TensorProto, helper

from benchmarks.latency import roofline
from benchmarks.latency.roofline import Roofline, compute_dtype, count_work, measure_roofline, roofline_ms
from export.backends.registry import Model, models_of
from export.config import OnnxConfig
from export.multiply_adds import multiply_adds
from export.to_onnx import export_onnx, load_onnx
from student.model import load_student
from vpr.inference.model_size import count_multiply_adds

# 10 G multiply-adds and 2 GB a second.
MACHINE = Roofline("fp32", 1, 10e9, 2e9)


def test_roofline_is_the_slower_of_compute_and_memory() -> None:
    assert MACHINE.milliseconds(5e9, 1e6) == pytest.approx(500)
    assert MACHINE.milliseconds(1e6, 3e9) == pytest.approx(1500)
    ridge = MACHINE.multiply_adds / MACHINE.bytes  # multiply-adds per byte at which both take as long
    assert MACHINE.milliseconds(ridge * 7e6, 7e6) == pytest.approx(1000 * 7e6 / 2e9)


def test_weights_move_once_and_images_each_time(student_artifact: Path) -> None:
    (model,) = models_of(student_artifact)
    weights = (student_artifact / "model.safetensors").stat().st_size
    image, embedding = 4 * 3 * 32 * 32, 4 * 32
    for batch in (1, 8):
        expected = 1000 * (weights + batch * (image + embedding)) / 2e9
        assert roofline_ms(MACHINE, model, 0, batch) == pytest.approx(expected)
        assert roofline_ms(MACHINE, model, 10**9, batch) == pytest.approx(100 * batch)


@pytest.mark.parametrize("opset", [20, 23])
def test_graph_has_the_multiply_adds_of_pytorch(each_student: Path, opset: int, tmp_path: Path) -> None:
    path = export_onnx(OnnxConfig(str(each_student), str(tmp_path / "fp32"), opset=opset, images=2))
    graph, artifact = load_onnx(path)
    expected = count_multiply_adds(load_student(each_student)[0], 32)
    assert multiply_adds(graph) == expected
    assert count_work(artifact) == expected
    assert count_work(models_of(each_student)[0].artifact) == expected


def test_unknown_shape_gives_no_multiply_adds() -> None:
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", axis]) for name, axis in (("a", 4), ("b", "k"))
    ]
    output = helper.make_tensor_value_info("c", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "g", inputs, [output])
    assert multiply_adds(helper.make_model(graph)) is None
    # The graph is not modified.
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"


class _Runner:
    """Stub of a backend with a precision."""

    def __init__(self, name: str, precision: str) -> None:
        self.name, self._precision = name, precision

    def precision(self, artifact: object) -> str:
        return self._precision


@pytest.mark.parametrize(
    ("backend", "precision", "vnni", "old", "expected"),
    [
        ("torch", "fp32", True, False, ("fp32", "cpu")),
        ("onnxruntime-cpu", "fp16", False, False, ("fp32", "cpu")),  # CPU runtimes compute FP16 graphs in FP32
        ("openvino", "int8", True, False, ("int8", "cpu")),
        ("openvino", "int8", False, False, None),
        ("onnxruntime-cuda", "fp16", True, False, ("fp16", "cuda")),
        # These runtimes multiply FP32 graphs in TF32 where the GPU has it; PyTorch does where it is told.
        ("onnxruntime-cuda", "fp32", True, False, ("tf32", "cuda")),
        ("tensorrt", "fp32", True, False, ("tf32", "cuda")),
        ("tensorrt", "fp32", True, True, ("fp32", "cuda")),
        ("torch-cuda", "fp32", True, False, ("fp32", "cuda")),
        ("torch-cuda-tf32", "tf32", True, False, ("tf32", "cuda")),
        ("torch-compile-cuda-bf16", "bf16", True, False, ("bf16", "cuda")),
        ("tensorrt-rtx", "int8-mixed", False, False, ("int8", "cuda")),
        ("tensorrt-rtx", "int8, kernels unknown", False, False, None),
        ("tensorrt-rtx", "int8 weights only", False, False, ("fp16", "cuda")),
        ("onnxruntime-cuda", "int8", True, False, None),
        ("tensorrt", "fp8", True, False, None),
    ],
)
def test_roofline_has_the_dtype_of_the_products(
    backend: str,
    precision: str,
    vnni: bool,
    old: bool,
    expected: tuple[str, str] | None,
    student_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roofline, "is_older_than", lambda architecture: old and architecture == "sm80")
    monkeypatch.setattr(roofline, "lacks_vnni", lambda: not vnni)
    model = replace(models_of(student_artifact)[0], runner=_Runner(backend, precision))
    assert isinstance(model, Model)
    assert compute_dtype(model) == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_roofline_is_measured(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.latency.roofline._SIDES", {"cpu": (64, 128)})
    monkeypatch.setattr("benchmarks.latency.roofline._COPIED_BYTES", 1 << 16)
    machine = measure_roofline(dtype, "cpu", 1)
    assert (machine.dtype, machine.threads) == (dtype, 1)
    assert machine.multiply_adds > 0
    assert machine.bytes > 0


class FakeCuda:
    """PyTorch's CUDA with a clock of the device, on which a product of side n takes n cubed / rate seconds.

    The clock of the host shows 100 microseconds for the start of each kernel, whatever its size.
    """

    def __init__(self, rate: float) -> None:
        self.rate, self.now, self.sides = rate, 0.0, []

    def product(self, dtype: str, device: str, side: int) -> Callable[[], None]:
        assert device == "cuda"
        self.sides.append(side)

        def call() -> None:
            self.now += side**3 / self.rate

        return call

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(time=0.0)
        event.record = lambda: setattr(event, "time", self.now)
        event.elapsed_time = lambda end: 1000 * (end.time - event.time)
        return event


@pytest.mark.parametrize(("rate", "sides"), [(4e14, [2048, 4096, 8192, 16384]), (4e12, [2048, 4096, 8192])])
def test_gpu_roofline_is_timed_by_events_on_large_products(
    rate: float, sides: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large GPU needs large products; a small one would take minutes for them."""
    import torch

    fake = FakeCuda(rate)
    monkeypatch.setattr(roofline, "_product", fake.product)
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: pytest.fail("the host's clock is no measure"))
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert roofline._fastest_product("fp16", "cuda") == pytest.approx(rate)
    assert fake.sides == sides


def test_float32_products_are_set_and_restored() -> None:
    from torch import backends

    from export.backends.pytorch import float32_products

    products, convolutions = backends.cuda.matmul, backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    for is_tf32 in (True, False):
        with float32_products(is_tf32):
            assert (products.allow_tf32, convolutions.allow_tf32) == (is_tf32, is_tf32)
        assert (products.allow_tf32, convolutions.allow_tf32) == before
