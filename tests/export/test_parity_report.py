from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import numpy_helper

from experiments.random_student import write_random_student
from export.config import Int8Config, OnnxConfig, ParityConfig
from export.fp16 import to_fp16
from export.int8 import export_int8
from export.parity_report import compare_exports, compare_layers
from export.to_onnx import export_onnx
from student.model import load_student
from tests.catalogs import write_catalog
from tests.conftest import small_student
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog


def _pixels(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 3, 32, 32)).astype(np.float32)


def test_export_agrees_in_every_layer(each_student: Path, graph: onnx.ModelProto) -> None:
    model, _ = load_student(each_student)
    for exported, min_cosine in ((graph, 1 - 1e-9), (to_fp16(graph), 0.9999)):
        report = compare_layers(model, exported, _pixels(4), min_cosine)
        names = [layer["layer"] for layer in report["layers"]]
        assert report["first_departing"] is None
        for block in range(2):
            for end in ("0.norm", "0.to_qkv", "0.to_out.0", "1.net.0", "1.net.1", "1.net.2", "1.net.4"):
                assert f"vit.transformer.layers.{block}.{end}" in names
        assert "vit.mlp_head" in names


@pytest.mark.parametrize("half", [False, True])
def test_first_departing_layer_is_named(each_student: Path, graph: onnx.ModelProto, half: bool) -> None:
    victim = "vit.transformer.layers.1.0.to_out.0"
    broken = onnx.ModelProto()
    broken.CopyFrom(graph)
    bias = next(tensor for tensor in broken.graph.initializer if tensor.name == f"{victim}.bias")
    noise = np.random.default_rng(1).normal(size=64).astype(np.float32)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + noise, bias.name))
    model, _ = load_student(each_student)
    report = compare_layers(model, to_fp16(broken) if half else broken, _pixels(4), 0.99)
    assert report["first_departing"] == victim


def test_command_compares_exports_and_skips_when_done(
    each_student: Path, fp32: Path, ranges: Path, catalog: Catalog, tmp_path: Path
) -> None:
    assert catalog.artifact is not None
    half = export_onnx(OnnxConfig(str(each_student), str(tmp_path / "fp16"), precision="fp16"))
    int8 = export_int8(Int8Config(str(fp32), str(ranges), str(tmp_path / "int8")))
    models, path = (str(fp32), str(half), str(int8)), str(catalog.artifact.path)
    config = ParityConfig(str(each_student), models, path, str(tmp_path / "parity"), layers=True)
    rows = json.loads((compare_exports(config) / "parity.json").read_text())
    assert [row["model"] for row in rows] == ["fp32", "fp16", "int8"]
    assert all(row["cosine_min"] > limit for row, limit in zip(rows, (1 - 1e-6, 0.9999, 0.99), strict=True))
    assert rows[0]["first_changed"] == 0
    assert rows[0]["cosine_mean"] >= rows[1]["cosine_mean"] >= rows[2]["cosine_mean"]
    before = (tmp_path / "parity" / "card.json").stat().st_mtime_ns
    compare_exports(config)
    assert (tmp_path / "parity" / "card.json").stat().st_mtime_ns == before


def test_images_in_both_roles_do_not_find_themselves(
    each_student: Path, fp32: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranked similarities are those of a matrix product, without those of an image to itself."""
    table = catalog.select(split="test").table
    column = SCHEMA.get_field_index("role")
    roles = (pa.array([role] * len(table), pa.string()) for role in ("gallery", "query"))
    doubled = pa.concat_tables([table.set_column(column, SCHEMA.field("role"), role) for role in roles])
    path = write_catalog(tmp_path / "c", Catalog(doubled.combine_chunks(), catalog.root))
    ranked: list[np.ndarray] = []
    monkeypatch.setattr("export.parity_report.rank_changes", lambda *scores: ranked.extend(scores) or {})
    output = compare_exports(ParityConfig(str(each_student), (str(fp32),), str(path), str(tmp_path / "parity")))
    assert load_artifact(output).card.config["queries_search"] == "leave-one-out"
    for scores in ranked:
        assert np.array_equal(np.isneginf(scores), np.eye(len(table), dtype=bool))
        assert np.allclose(scores, scores.T, atol=1e-5)
    assert len(ranked) == 2


def test_export_of_another_student_is_rejected(fp32: Path, catalog: Catalog, tmp_path: Path) -> None:
    from dataclasses import replace

    assert catalog.artifact is not None
    other = write_random_student(tmp_path / "other", replace(small_student("patch"), image_size=48))
    config = ParityConfig(str(other), (str(fp32),), str(catalog.artifact.path), str(tmp_path / "parity"))
    with pytest.raises(UserError, match="Use its exports"):
        compare_exports(config)
    assert not (tmp_path / "parity").exists()
