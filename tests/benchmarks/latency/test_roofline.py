from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
    ("backend", "precision", "vnni", "expected"),
    [
        ("torch", "fp32", True, ("fp32", "cpu")),
        ("onnxruntime-cpu", "fp16", False, ("fp32", "cpu")),  # CPU runtimes compute FP16 graphs in FP32
        ("openvino", "int8", True, ("int8", "cpu")),
        ("openvino", "int8", False, None),
        ("onnxruntime-cuda", "fp16", True, ("fp16", "cuda")),
        ("tensorrt-rtx", "int8-mixed", False, ("int8", "cuda")),
        ("tensorrt", "fp8", True, None),
    ],
)
def test_roofline_has_the_dtype_of_the_products(
    backend: str,
    precision: str,
    vnni: bool,
    expected: tuple[str, str] | None,
    student_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roofline, "lacks_vnni", lambda: not vnni)
    model = replace(models_of(student_artifact)[0], runner=_Runner(backend, precision))
    assert isinstance(model, Model)
    assert compute_dtype(model) == expected


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_roofline_is_measured(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.latency.roofline._SIDES", (64, 128))
    monkeypatch.setattr("benchmarks.latency.roofline._COPIED_BYTES", 1 << 16)
    machine = measure_roofline(dtype, "cpu", 1)
    assert (machine.dtype, machine.threads) == (dtype, 1)
    assert machine.multiply_adds > 0
    assert machine.bytes > 0
