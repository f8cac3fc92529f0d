from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from export.config import Int8Config, OnnxConfig
from export.int8 import export_int8
from export.parity import parity
from export.to_onnx import export_onnx, run_graph
from student.config import DistillConfig, QuantiseConfig
from student.distill import distill
from student.model import Student, load_student
from student.qat import FakeQuantLinear, insert_fake_quant, read_thresholds
from tests.conftest import small_student
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.inference.config import DEFAULT_EXCLUDED_LAYERS


def test_values_and_gradients_are_pytorch_s_own_fake_quantisation() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 10), torch.randn(7, 24) * 2
    layer = FakeQuantLinear(nn.Linear(24, 10), 3.0)
    layer.weight, layer.bias = linear.weight, linear.bias
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = layer(mine)
    found.square().sum().backward()
    gradient, linear.weight.grad = linear.weight.grad, None
    scales = (linear.weight.detach().abs().amax(dim=1) / 127).half().float()
    weight = torch.fake_quantize_per_channel_affine(
        linear.weight, scales, torch.zeros(10, dtype=torch.int32), axis=0, quant_min=-127, quant_max=127
    )
    seen = torch.fake_quantize_per_tensor_affine(theirs, float(np.float16(3 / 127)), 0, -128, 127)
    expected = nn.functional.linear(seen, weight, linear.bias)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(gradient, linear.weight.grad)


def test_what_lies_beyond_the_range_has_no_gradient() -> None:
    layer = FakeQuantLinear(nn.Linear(4, 2), 1.0)
    x = torch.tensor([[0.5, 3.0, -0.5, -3.0]], requires_grad=True)
    layer(x).sum().backward()
    assert (x.grad[0] != 0).tolist() == [True, False, True, False]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def quantised(request: pytest.FixtureRequest, finished: Path) -> Path:
    """The finished student's graph in INT8, with the ranges it was finished under."""
    folder, base = finished.parent, request.param
    return export_int8(
        Int8Config(str(folder / "after"), str(folder / "ranges"), str(folder / f"int8-{base}"), base=base)
    )


@pytest.fixture(scope="module")
def finished(student: Path, config: DistillConfig, catalog: Catalog) -> Path:
    """student -> graph -> ranges -> finished student -> its graph."""
    folder, kept = student.parent, str(catalog.artifact.path)  # type: ignore[union-attr]
    before = export_onnx(OnnxConfig(str(student), str(folder / "before")))
    ranges = calibrate(CalibrateConfig(str(before), kept, str(folder / "ranges"), count=48))
    finished = distill(
        replace(
            config,
            output=str(folder / "finished"),
            start=str(student),
            quantise=QuantiseConfig(str(ranges)),
            epochs=2,
            lr=1e-4,
        )
    )
    assert finished is not None
    export_onnx(OnnxConfig(str(finished), str(folder / "after")))
    return finished


def test_the_exported_graph_computes_what_the_student_was_finished_under(quantised: Path) -> None:
    folder = quantised.parent
    model, artifact = load_student(folder / "finished")
    assert {parent.role for parent in artifact.card.parents} == {"teacher", "catalog", "start", "ranges"}
    inputs = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        whole = model(torch.from_numpy(inputs)).numpy()
    names = insert_fake_quant(model, read_thresholds(folder / "ranges"), DEFAULT_EXCLUDED_LAYERS)
    assert len(names) == len(load_artifact(quantised).card.metrics["quantised"]) == 8
    with torch.inference_mode():
        expected = model(torch.from_numpy(inputs)).numpy()
    found = run_graph(onnx.load(load_artifact(quantised).file("model.onnx")), inputs)
    close = parity(expected, found)
    assert close["cosine_min"] > (0.99999 if quantised.name == "int8-fp32" else 0.999)
    assert close["cosine_min"] > parity(whole, found)["cosine_min"]  # and Q/DQ does something


def test_the_finished_student_differs_from_its_start_by_training_alone(quantised: Path, student: Path) -> None:
    before, after = load_student(student)[0].state_dict(), load_student(quantised.parent / "finished")[0].state_dict()
    assert before.keys() == after.keys()
    name = "vit.transformer.layers.0.0.to_qkv.weight"
    assert 0 < float((before[name] - after[name]).abs().mean()) < 0.1 * float(before[name].abs().mean())


def test_ranges_of_another_student_are_refused(finished: Path, config: DistillConfig, tmp_path: Path) -> None:
    ranges = str(finished.parent / "ranges")
    with pytest.raises(UserError, match=r"quantise\.ranges: .* is not of a graph of"):
        distill(replace(config, output=str(tmp_path / "s"), start=str(finished), quantise=QuantiseConfig(ranges)))
    deeper = Student(replace(load_student(finished)[0].config, depth=3))
    with pytest.raises(UserError, match=r"no range for 'vit\.transformer\.layers\.2\.0\.to_qkv'"):
        insert_fake_quant(deeper, read_thresholds(ranges), DEFAULT_EXCLUDED_LAYERS)


def test_the_export_keeps_what_the_finishing_kept(finished: Path, tmp_path: Path) -> None:
    ranges, more = str(finished.parent / "ranges"), (*DEFAULT_EXCLUDED_LAYERS, "vit.transformer.layers.0")
    with pytest.raises(
        UserError, match=r"exclude_layers: QAT fine-tuned the student without \[vit\.to_patch_embedding, vit\.mlp_head\]"
    ):
        export_int8(Int8Config(str(finished.parent / "after"), ranges, str(tmp_path / "int8"), exclude_layers=more))


def test_wrong_ranges_are_refused(quantised: Path, config: DistillConfig, tmp_path: Path) -> None:
    ranges = str(quantised.parent / "ranges")
    model, _ = load_student(quantised.parent / "student")
    thresholds = read_thresholds(ranges)
    with pytest.raises(UserError, match=r"quantise\.keep: leaves nothing"):
        insert_fake_quant(model, thresholds, ("vit",))
    with pytest.raises(UserError, match="is no linear of this student"):
        insert_fake_quant(model, {"vit.transformer.layers.9.0.to_qkv": 1.0}, DEFAULT_EXCLUDED_LAYERS)
    with pytest.raises(UserError, match=r"'vit\.to_patch_embedding\.layers\.0' is a convolution.*keep it too"):
        insert_fake_quant(Student(replace(small_student("conv"))), read_thresholds(ranges), ("vit.mlp_head",))
    with pytest.raises(UserError, match=r"quantise\.ranges: finishes a trained student: name it by start"):
        replace(config, quantise=QuantiseConfig(ranges))
