from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from student.qat import FakeQuantLinear, insert_fake_quant, read_thresholds, scale_rows
from tests.conftest import small_student
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.inference.config import DEFAULT_EXCLUDED_LAYERS
from vpr.inference.int8 import LEVELS, weight_scales


def test_fake_quantisation_equals_pytorch() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 10), torch.randn(7, 24) * 2
    layer = FakeQuantLinear(nn.Linear(24, 10), 3.0)
    layer.weight, layer.bias = linear.weight, linear.bias
    x_layer, x_pytorch = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = layer(x_layer)
    out.square().sum().backward()
    gradient, linear.weight.grad = linear.weight.grad, None
    scales = (linear.weight.detach().abs().amax(dim=1) / 127).half().float()
    weight = torch.fake_quantize_per_channel_affine(
        linear.weight, scales, torch.zeros(10, dtype=torch.int32), axis=0, quant_min=-127, quant_max=127
    )
    quantised = torch.fake_quantize_per_tensor_affine(x_pytorch, float(np.float16(3 / 127)), 0, -128, 127)
    expected = nn.functional.linear(quantised, weight, linear.bias)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x_layer.grad, x_pytorch.grad)
    torch.testing.assert_close(gradient, linear.weight.grad)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(1e-9, 1e5))
def test_weights_are_trained_with_the_scales_of_the_export(seed: int, size: float) -> None:
    generator = np.random.default_rng(seed)
    weight = (size * generator.normal(size=(50, 3))).astype(np.float32)
    # Halfway between two numbers of FP16, and next to it: there a second rounding could go wrong.
    halfway = LEVELS * (1 + (2 * generator.integers(0, 1024, 50) + 1) * 2.0**-11)
    weight[::2, 0] = halfway[::2]
    weight[::4, 0] = np.nextafter(weight[::4, 0], np.float32(generator.choice([0, 1e9])))
    np.testing.assert_array_equal(scale_rows(torch.from_numpy(weight)).numpy(), weight_scales(weight, axis=0))


@pytest.mark.slow
def test_compiled_layer_trains_with_the_scales_of_the_export() -> None:
    """torch.compile computes FP16 in float32, and so drops a rounding to FP16."""
    torch.manual_seed(0)
    layer, x = FakeQuantLinear(nn.Linear(64, 300), 3.0), torch.randn(50, 64)
    expected = layer(x).detach()
    layer.compile(dynamic=False)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=0, atol=1e-5)


def test_values_outside_the_range_have_no_gradient() -> None:
    layer = FakeQuantLinear(nn.Linear(4, 2), 1.0)
    x = torch.tensor([[0.5, 3.0, -0.5, -3.0]], requires_grad=True)
    layer(x).sum().backward()
    assert (x.grad[0] != 0).tolist() == [True, False, True, False]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def quantised(request: pytest.FixtureRequest, qat_student: Path) -> Path:
    """Export the fine-tuned student in INT8 with the ranges of its training."""
    folder, base = qat_student.parent, request.param
    return export_int8(
        Int8Config(str(folder / "after"), str(folder / "ranges"), str(folder / f"int8-{base}"), base=base)
    )


@pytest.fixture(scope="module")
def qat_student(student: Path, config: DistillConfig, catalog: Catalog) -> Path:
    """Run student -> graph -> ranges -> QAT student -> its graph."""
    folder, catalog_path = student.parent, str(catalog.artifact.path)  # type: ignore[union-attr]
    before = export_onnx(OnnxConfig(str(student), str(folder / "before")))
    ranges = calibrate(CalibrateConfig(str(before), catalog_path, str(folder / "ranges"), count=48))
    qat_student = distill(
        replace(
            config,
            output=str(folder / "qat"),
            start=str(student),
            quantise=QuantiseConfig(str(ranges)),
            epochs=2,
            lr=1e-4,
        )
    )
    assert qat_student is not None
    export_onnx(OnnxConfig(str(qat_student), str(folder / "after")))
    return qat_student


def test_int8_graph_equals_the_qat_student(quantised: Path) -> None:
    folder = quantised.parent
    model, artifact = load_student(folder / "qat")
    assert {parent.role for parent in artifact.card.parents} == {"teacher", "catalog", "start", "ranges"}
    inputs = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        float_output = model(torch.from_numpy(inputs)).numpy()
    names = insert_fake_quant(model, read_thresholds(load_artifact(folder / "ranges")), DEFAULT_EXCLUDED_LAYERS)
    assert len(names) == len(load_artifact(quantised).card.metrics["quantised"]) == 8
    with torch.inference_mode():
        expected = model(torch.from_numpy(inputs)).numpy()
    output = run_graph(onnx.load(load_artifact(quantised).file("model.onnx")), inputs)
    agreement = parity(expected, output)
    assert agreement["cosine_min"] > (0.99999 if quantised.name == "int8-fp32" else 0.999)
    assert agreement["cosine_min"] > parity(float_output, output)["cosine_min"]  # Q/DQ has an effect.


def test_qat_changes_the_weights_slightly(quantised: Path, student: Path) -> None:
    before, after = load_student(student)[0].state_dict(), load_student(quantised.parent / "qat")[0].state_dict()
    assert before.keys() == after.keys()
    name = "vit.transformer.layers.0.0.to_qkv.weight"
    assert 0 < float((before[name] - after[name]).abs().mean()) < 0.1 * float(before[name].abs().mean())


def test_ranges_of_another_student_are_rejected(qat_student: Path, config: DistillConfig, tmp_path: Path) -> None:
    ranges = str(qat_student.parent / "ranges")
    with pytest.raises(UserError, match=r"quantise\.ranges: .* was not measured on a graph of"):
        distill(replace(config, output=str(tmp_path / "s"), start=str(qat_student), quantise=QuantiseConfig(ranges)))
    deeper = Student(replace(load_student(qat_student)[0].config, depth=3))
    with pytest.raises(UserError, match=r"no range for the layer 'vit\.transformer\.layers\.2\.0\.to_qkv'"):
        insert_fake_quant(deeper, read_thresholds(load_artifact(ranges)), DEFAULT_EXCLUDED_LAYERS)


def test_each_input_is_loaded_once(
    qat_student: Path, student: Path, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []

    def load(path: Path | str, *kind: Any) -> Artifact:
        paths.append(str(path))
        return load_artifact(path, *kind)

    for module in ("student.inputs", "student.start", "student.model", "teacher.model", "vpr.data.catalog"):
        monkeypatch.setattr(f"{module}.load_artifact", load)
    ranges = str(qat_student.parent / "ranges")
    settings = {"start": str(student), "quantise": QuantiseConfig(ranges), "dry_run": True}
    distill(replace(config, output=str(tmp_path / "s"), **settings))
    assert sorted(paths) == sorted([config.catalog, *config.teacher, str(student), ranges])


def test_export_excludes_the_layers_of_qat(qat_student: Path, tmp_path: Path) -> None:
    ranges, more = str(qat_student.parent / "ranges"), (*DEFAULT_EXCLUDED_LAYERS, "vit.transformer.layers.0")
    with pytest.raises(
        UserError,
        match=r"exclude_layers: QAT excluded \[vit\.to_patch_embedding, vit\.mlp_head\]",
    ):
        export_int8(Int8Config(str(qat_student.parent / "after"), ranges, str(tmp_path / "int8"), exclude_layers=more))


def test_wrong_ranges_are_rejected(quantised: Path, config: DistillConfig, tmp_path: Path) -> None:
    ranges = str(quantised.parent / "ranges")
    model, _ = load_student(quantised.parent / "student")
    thresholds = read_thresholds(load_artifact(ranges))
    with pytest.raises(UserError, match=r"quantise\.exclude_layers: excludes all layers"):
        insert_fake_quant(model, thresholds, ("vit",))
    with pytest.raises(UserError, match="this student has no linear layer"):
        insert_fake_quant(model, {"vit.transformer.layers.9.0.to_qkv": 1.0}, DEFAULT_EXCLUDED_LAYERS)
    with pytest.raises(UserError, match=r"convolution 'vit\.to_patch_embedding\.layers\.0'\. Exclude it too"):
        insert_fake_quant(
            Student(replace(small_student("conv"))), read_thresholds(load_artifact(ranges)), ("vit.mlp_head",)
        )
    with pytest.raises(UserError, match=r"quantise\.ranges: QAT fine-tunes a trained student"):
        replace(config, quantise=QuantiseConfig(ranges))


def test_excluded_name_without_a_layer_is_rejected() -> None:
    student = Student(small_student("patch"))
    with pytest.raises(
        UserError, match=r"quantise\.exclude_layers: no layer begins with 'nosuchlayer'.*nearest are 'vit"
    ):
        insert_fake_quant(student, {"vit.transformer.layers.0.0.to_qkv": 1.0}, ("vit.mlp_head", "nosuchlayer"))
