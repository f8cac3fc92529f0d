"""FP16 overflow. ONNX's reference evaluator computes in real FP16; the CPU runtimes do not."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from calibration.onnx_layers import weighted_nodes
from export.config import EngineConfig, Int8Config, OnnxConfig
from export.fp16 import find_overflow, to_fp16
from export.int8 import export_int8
from export.parity import parity
from export.qdq import quantise, quantised_nodes
from export.tensorrt.bindings import import_tensorrt
from export.tensorrt.build import build_plan
from export.to_onnx import export_onnx, load_onnx, run_graph
from student.model import load_student
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog

# Nodes that write to the residual stream. LayerNorm undoes a common factor, so the embeddings hardly change.
WRITERS = ("to_out.0/MatMul", "to_out.0/Add", "net.4/MatMul", "net.4/Add", "vit/Add", "to_patch_embedding.3/Add")
WRITERS += ("to_patch_embedding.3/LayerNormalization", "to_patch_embedding.project/Conv")


def _amplify(graph: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """Scale the residual stream of a student by ``factor``."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            # A copy, because the exporter stores equal weights once, such as those of all new LayerNorms.
            if node.name.endswith(WRITERS) and name in weights:
                node.input[i] = f"{name}_{node.name}"
                values = numpy_helper.to_array(weights[name]) * np.float32(factor)
                model.graph.initializer.append(numpy_helper.from_array(values, node.input[i]))
    return model


def _inputs(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 3, 32, 32)).astype(np.float32)


def _run_in_real_fp16(graph: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return ReferenceEvaluator(graph).run(None, {"pixels": inputs})[0]


def test_small_values_need_no_fp32_nodes(graph: onnx.ModelProto) -> None:
    inputs = _inputs(8)
    assert find_overflow(graph, inputs) == []
    actual = _run_in_real_fp16(to_fp16(graph), inputs[:2])
    assert parity(run_graph(graph, inputs[:2]), actual)["cosine_min"] > 0.9999


@pytest.mark.parametrize("factor", [300, 20_000])
def test_overflowing_nodes_stay_fp32(graph: onnx.ModelProto, factor: float) -> None:
    amplified, inputs = _amplify(graph, factor), _inputs(2)
    expected = run_graph(amplified, inputs)
    assert parity(expected, _run_in_real_fp16(to_fp16(amplified), inputs))["cosine_min"] < 0.9
    fp32_nodes = find_overflow(amplified, inputs)
    half = to_fp16(amplified, fp32_nodes)
    assert parity(expected, _run_in_real_fp16(half, inputs))["cosine_min"] > 0.9999
    assert "vit.transformer.layers.1.0.norm/LayerNormalization" in fp32_nodes
    assert len(fp32_nodes) < len(amplified.graph.node) / 2


def test_quantised_graph_keeps_fp32_nodes(graph: onnx.ModelProto) -> None:
    amplified, inputs = _amplify(graph, 20_000), _inputs(2)
    limits = {node.input[0]: 4.0 for node in weighted_nodes(graph)}
    quantised = quantise(amplified, limits, quantised_nodes(amplified))
    half = to_fp16(quantised, find_overflow(amplified, inputs))
    assert parity(run_graph(quantised, inputs), _run_in_real_fp16(half, inputs))["cosine_min"] > 0.999
    _check_build(half)


def _check_build(graph: onnx.ModelProto) -> None:
    config = EngineConfig(onnx="", output="", target="sm80,sm86,sm89,sm120")
    plan, layers = build_plan(import_tensorrt("tensorrt-rtx"), "tensorrt-rtx", graph, config)
    assert len(plan) > 10_000
    assert layers["precisions"]["FLOAT"] > 0


def test_builder_accepts_mixed_precision(graph: onnx.ModelProto) -> None:
    amplified = _amplify(graph, 300)
    _check_build(to_fp16(amplified, find_overflow(amplified, _inputs(2))))


def test_shared_weight_is_stored_in_both_precisions(graph: onnx.ModelProto) -> None:
    shared = onnx.ModelProto()
    shared.CopyFrom(graph)
    norms = [node for node in shared.graph.node if node.op_type == "LayerNormalization"]
    norms[-1].input[1] = norms[-2].input[1]
    half = to_fp16(shared, [norms[-1].name])
    dtypes = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert dtypes[norms[-2].input[1]] == TensorProto.FLOAT
    assert dtypes[f"{norms[-2].input[1]}_fp16"] == TensorProto.FLOAT16
    inputs = _inputs(2)
    assert parity(run_graph(shared, inputs), _run_in_real_fp16(half, inputs))["cosine_min"] > 0.9999


def test_commands_record_fp32_nodes(student_artifact: Path, catalog: Catalog, tmp_path: Path) -> None:
    """A student with a stem that overflows FP16, exported as an INT8 graph."""
    assert catalog.artifact is not None
    from safetensors.torch import save_file

    model, artifact = load_student(student_artifact)
    project = model.vit.to_patch_embedding.project
    project.weight.data *= 3000
    with write_artifact(tmp_path / "student", "student", artifact.card.config) as draft:
        save_file(model.state_dict(), draft.path / "model.safetensors")
        draft.preprocess, draft.embedding = artifact.card.preprocess, artifact.card.embedding
    source = str(catalog.artifact.path)
    fp32 = export_onnx(OnnxConfig(str(tmp_path / "student"), str(tmp_path / "fp32"), catalog=source, images=8))
    fp32_nodes = load_artifact(fp32).card.metrics["fp32_nodes"]
    assert "vit.transformer.layers.0.0.norm/LayerNormalization" in fp32_nodes
    ranges = calibrate(CalibrateConfig(str(fp32), source, str(tmp_path / "ranges"), count=8))
    int8 = export_int8(Int8Config(str(fp32), str(ranges), str(tmp_path / "int8")))
    quantised, artifact = load_onnx(int8)
    assert artifact.card.metrics["fp32_nodes"] == fp32_nodes
    assert (
        parity(run_graph(load_onnx(fp32)[0], _inputs(2)), _run_in_real_fp16(quantised, _inputs(2)))["cosine_min"] > 0.9
    )


def test_catalogue_without_split_is_rejected(student_artifact: Path, catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    config = OnnxConfig(str(student_artifact), str(tmp_path / "o"), catalog=str(catalog.artifact.path), split="none")
    with pytest.raises(UserError, match="no images in the none split"):
        export_onnx(config)
