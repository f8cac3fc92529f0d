from __future__ import annotations

from pathlib import Path

import pytest

from calibration.calibrate import calibrate
from experiments.int8 import gpu_engines as engines_gpu
from experiments.int8.gpu_engines import GRAPHS, build_engines, export_graphs, gpu_engines, unmeasured
from experiments.int8.tools import TrainedStudent
from vpr.artifacts.store import load_artifact
from vpr.data.catalog import Catalog


@pytest.fixture
def student(
    student_artifact: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainedStudent:
    assert catalog.artifact is not None
    monkeypatch.setattr(engines_gpu, "BATCHES", (1, 8))
    monkeypatch.setattr(
        engines_gpu, "calibrate", lambda config: calibrate(type(config)(**{**vars(config), "count": 32}))
    )
    return TrainedStudent("small", student_artifact, catalog.artifact.path, tmp_path)


def test_every_graph_becomes_an_engine_by_the_builder_that_is_here(
    student: TrainedStudent, capsys: pytest.CaptureFixture[str]
) -> None:
    graphs = export_graphs(student)
    assert tuple(graphs) == GRAPHS
    engines = build_engines(graphs, "sm89")
    assert {f"{name}-tensorrt-rtx" for name in GRAPHS} <= set(engines)
    cards = {name: load_artifact(path).card.metrics for name, path in engines.items()}
    assert cards["fp16-tensorrt-rtx"]["layers"]["ATTENTION_INPUT"] == 2
    assert "ATTENTION_INPUT" not in cards["fp16-opset20-tensorrt-rtx"]["layers"]
    quantised = [cards[f"{name}-tensorrt-rtx"]["layers"].get("QUANTIZE", 0) for name in GRAPHS]
    assert quantised[:2] == [0, 0]
    assert 0 < quantised[2] < quantised[3]
    if not any(name.endswith("-tensorrt") for name in engines):
        assert "fp16-tensorrt: not built: tensorrt: cannot be loaded" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_what_runs_is_timed_and_scored_and_what_does_not_says_why(student: TrainedStudent) -> None:
    figures, tables = gpu_engines(student, "sm89", "command", ("torch", "onnxruntime-cpu", "tensorrt-rtx"), 0.02)
    rows = {row["model"]: row for row in tables["engines"]}
    ran = [name for name, row in rows.items() if row["recall@1 [95 %]"]]
    assert {"student (torch)", "fp16 (onnxruntime-cpu)", "int8 (onnxruntime-cpu)"} <= set(ran)
    assert "GPU" in rows["int8-tensorrt-rtx (tensorrt-rtx)"]["notes"]
    values = {figure.name: figure.value for figure in figures}
    assert {"student (torch), batch 1", "student (torch), batch 8", "student (torch): recall@1"} <= set(values)
    assert len([name for name in values if ": recall@1" in name]) == len(ran)


def test_without_a_gpu_all_is_named_and_nothing_has_a_value() -> None:
    figures = unmeasured("command")
    assert all(figure.value is None for figure in figures)
    assert len({figure.name for figure in figures}) == len(figures)
    assert "int8-tensorrt-rtx (tensorrt-rtx), batch 32" in {figure.name for figure in figures}
