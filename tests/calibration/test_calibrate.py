from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
from onnx import numpy_helper

from calibration.activation_stats import measure_activations
from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from calibration.onnx_layers import linear_nodes
from export.config import OnnxConfig
from export.to_onnx import export_onnx, load_onnx
from student.model import load_student
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import read_batches


@pytest.fixture(scope="module")
def fp32(student_artifact: Path) -> Path:
    return export_onnx(OnnxConfig(str(student_artifact), str(student_artifact.parent / "calibrated")))


@pytest.fixture(scope="module")
def config(fp32: Path, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> CalibrateConfig:
    assert catalog.artifact is not None
    output = tmp_path_factory.mktemp("ranges") / "ranges"
    return CalibrateConfig(str(fp32), str(catalog.artifact.path), str(output), count=40, method="minmax")


@pytest.fixture(scope="module")
def ranges(config: CalibrateConfig) -> Path:
    return calibrate(config)


def test_ranges_equal_pytorch_forward_hooks(ranges: Path, fp32: Path, catalog: Catalog) -> None:
    """Forward hooks on the PyTorch student over the recorded images give the same largest values."""
    model, artifact = load_student(fp32.parent / "student")
    largest: dict[str, float] = {}

    def record(name: str) -> object:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            largest[name] = max(largest.get(name, 0.0), inputs[0].abs().max().item())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(record(name))
    selected = set(pq.read_table(ranges / "images.parquet")["image"].to_pylist())
    rows = [i for i, image in enumerate(catalog.table["image"].to_pylist()) if image in selected]
    assert len(rows) == 40
    assert artifact.card.preprocess is not None
    images = Catalog(catalog.table.take(rows), catalog.root, catalog.artifact)
    with torch.inference_mode():
        for batch in read_batches(images, artifact.card.preprocess, 7):
            model(torch.from_numpy(batch))
    measured = json.loads((ranges / "ranges.json").read_text())
    for node in linear_nodes(load_onnx(fp32)[0]):
        layer = node.name.rsplit("/", 1)[0]
        assert measured[node.input[0]]["threshold"] == pytest.approx(largest[layer], rel=1e-4), layer


def test_recorded_images_are_training_images(ranges: Path, catalog: Catalog) -> None:
    recorded = pq.read_table(ranges / "images.parquet")
    assert recorded.column_names == ["image", "product", "sha256"]
    assert set(recorded["product"].to_pylist()) <= set(catalog.select(split="train").products.tolist())
    card = load_artifact(ranges, "ranges").card
    # Nine linears and four convolutions, and queries, keys and values of two attentions.
    assert (card.metrics["images"], card.metrics["tensors"]) == (40, 19)
    assert card.metrics["methods"]["minmax"] == 19
    assert [parent.role for parent in card.parents] == ["onnx", "student", "catalog"]


def test_unchanged_calibration_is_skipped(config: CalibrateConfig, ranges: Path) -> None:
    before = (ranges / "card.json").stat().st_mtime_ns
    calibrate(config)
    assert (ranges / "card.json").stat().st_mtime_ns == before


def test_thresholds_of_methods_are_ordered(config: CalibrateConfig, ranges: Path, tmp_path: Path) -> None:
    tables = {"minmax": json.loads((ranges / "ranges.json").read_text())}
    for method in ("mse", "percentile"):
        made = calibrate(replace(config, output=str(tmp_path / method), method=method, percentile=99.0))
        tables[method] = json.loads((made / "ranges.json").read_text())
    for name, entry in tables["minmax"].items():
        assert tables["percentile"][name]["threshold"] < entry["threshold"]
        assert 0 < tables["mse"][name]["threshold"] <= entry["threshold"]


def test_too_few_training_images_are_an_error(config: CalibrateConfig, tmp_path: Path) -> None:
    """The catalogue has 128 images, half of them of training products."""
    with pytest.raises(UserError, match="count: expected 1 to 64, the size of the training split, got 65"):
        calibrate(replace(config, count=65, output=str(tmp_path / "ranges")))
    assert not (tmp_path / "ranges").exists()


def test_fp16_graph_is_rejected(config: CalibrateConfig, tmp_path: Path, fp32: Path) -> None:
    half = export_onnx(OnnxConfig(str(fp32.parent / "student"), str(tmp_path / "fp16"), precision="fp16"))
    with pytest.raises(UserError, match="expected an FP32 graph"):
        calibrate(replace(config, onnx=str(half), output=str(tmp_path / "ranges")))


def test_non_finite_tensor_is_named(fp32: Path, catalog: Catalog) -> None:
    graph, artifact = load_onnx(fp32)
    broken = onnx.ModelProto()
    broken.CopyFrom(graph)
    node = linear_nodes(broken)[0]
    norm = next(n for n in broken.graph.node if node.input[0] in n.output)
    weight = next(t for t in broken.graph.initializer if t.name == norm.input[1])
    values = np.full_like(numpy_helper.to_array(weight), np.nan)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    assert artifact.card.preprocess is not None
    training = catalog.select(split="train")
    with pytest.raises(UserError, match=f"tensor '{node.input[0]}' is not finite"):
        measure_activations(broken, read_batches(training, artifact.card.preprocess, 16))
