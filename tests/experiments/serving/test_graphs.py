from __future__ import annotations

from pathlib import Path

import pytest

from experiments.serving.graphs import compare_runtimes
from vpr.data.catalog import Catalog


@pytest.mark.slow
def test_every_graph_is_compared(student_artifact: Path, catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    students = {"small": (student_artifact, catalog.artifact.path)}
    figures, rows = compare_runtimes(students, tmp_path, 2, "make", calibration=16)
    assert len(rows) == 2 * 3 * 2
    assert [figure.name.split(" on ")[1].partition(":")[0] for figure in figures] == [
        "OpenVINO",
        "ONNX Runtime",
        "ONNX Runtime without optimisations",
    ]
    assert all(figure.met for figure in figures)
