from __future__ import annotations

from pathlib import Path

import pytest

from experiments.random_teacher import write_random_teacher
from experiments.serving.speed import INPUTS, compare_allocators, compare_inputs, export_inputs, measure_bulk
from teacher.config import TowerConfig
from vpr.data.catalog import Catalog


@pytest.mark.slow
def test_all_parts_run(student_artifact: Path, catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    graphs = export_inputs(student_artifact, str(catalog.artifact.path), tmp_path, 16)
    figures, rows = compare_inputs(graphs, catalog, (1, 2), 0.05, "make")
    assert len(rows) == 2 * 2 * 2 * len(INPUTS)
    assert [figure.met for figure in figures if "cosine" in figure.name] == [True] * 8
    figures, rows = measure_bulk(graphs["int8", "float32"], catalog.artifact.path, tmp_path, 2, "make", threads=(0, 1))
    assert [row["work"] for row in rows][-2:] == ["`vpr embed --threads 0`", "`vpr embed --threads 1`"]
    assert figures[0].value is not None
    teacher = write_random_teacher(tmp_path / "teacher", TowerConfig(name="timm/tf_efficientnet_lite0", pretrained=""))
    figures, rows = compare_allocators({"small": teacher}, 2, "make", repeats=1)
    assert figures[0].value is not None
    assert figures[0].value > 0
