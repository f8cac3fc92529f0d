from __future__ import annotations

from pathlib import Path

import pytest

from calibration.calibrate import calibrate
from experiments.int8 import gpu_engines as module
from experiments.int8.gpu_engines import GRAPHS, build_engines, export_variants, gpu_engines, unmeasured
from experiments.int8.tools import TrainedStudent
from vpr.artifacts.store import load_artifact
from vpr.data.catalog import Catalog


@pytest.fixture
def student(
    student_artifact: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainedStudent:
    assert catalog.artifact is not None
    monkeypatch.setattr(module, "BATCHES", (1, 8))
    monkeypatch.setattr(module, "calibrate", lambda config: calibrate(type(config)(**{**vars(config), "count": 32})))
    return TrainedStudent("small", student_artifact, catalog.artifact.path, tmp_path)


@pytest.mark.slow
def test_every_graph_becomes_an_engine(student: TrainedStudent, capsys: pytest.CaptureFixture[str]) -> None:
    graphs = export_variants(student)
    assert tuple(graphs) == GRAPHS
    engines = build_engines(graphs, "sm89")
    assert {f"{name}-tensorrt-rtx" for name in GRAPHS} <= set(engines)
    cards = {name: load_artifact(path).card.metrics for name, path in engines.items()}
    assert cards["fp16-tensorrt-rtx"]["layers"]["ATTENTION_INPUT"] == 2
    assert "ATTENTION_INPUT" not in cards["fp16-opset20-tensorrt-rtx"]["layers"]
    quantised_layers = [cards[f"{name}-tensorrt-rtx"]["layers"].get("QUANTIZE", 0) for name in GRAPHS]
    assert quantised_layers[:2] == [0, 0]
    assert 0 < quantised_layers[2] < quantised_layers[3]
    if not any(name.endswith("-tensorrt") for name in engines):
        assert "fp16-tensorrt: not built: tensorrt: cannot be loaded" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_models_are_timed_and_scored(student: TrainedStudent) -> None:
    figures, tables = gpu_engines(student, "sm89", "command", ("torch", "onnxruntime-cpu", "tensorrt-rtx"), 0.02)
    rows = {row["model"]: row for row in tables["engines"]}
    scored = [name for name, row in rows.items() if row["recall@1 [95 %]"]]
    assert {"student (torch)", "fp16 (onnxruntime-cpu)", "int8 (onnxruntime-cpu)"} <= set(scored)
    assert "GPU" in rows["int8-tensorrt-rtx (tensorrt-rtx)"]["notes"]
    values = {figure.name: figure.value for figure in figures}
    assert {"student (torch), batch 1", "student (torch), batch 8", "student (torch): recall@1"} <= set(values)
    assert len([name for name in values if ": recall@1" in name]) == len(scored)


def test_no_gpu_gives_names_without_values() -> None:
    figures = unmeasured("command")
    assert all(figure.value is None for figure in figures)
    assert len({figure.name for figure in figures}) == len(figures)
    assert "int8-tensorrt-rtx (tensorrt-rtx), batch 32" in {figure.name for figure in figures}
