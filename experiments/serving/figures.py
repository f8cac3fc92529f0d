"""``make figures TOPIC=serving``: clients and their preprocessing, into ``docs/results/serving.json``.

Parts: ``verify``, ``skew``. The second one needs the student and the photographs of ``make figures TOPIC=student
PARTS=photos``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.config import SkewConfig
from benchmarks.recall.skew import measure_skew
from experiments.figures import Figure, Row, command_of, measure, record
from experiments.intervals import interval_text
from experiments.random_student import write_random_student
from experiments.serving.verify_table import measure_verify
from export.config import OnnxConfig
from export.to_onnx import export_onnx
from student.config import StudentConfig
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.config import CatalogConfig

_GRAPH = Path("runs/figures-student/photos/student-160-seed0-fp32")
_PHOTOS = Path("runs/figures-teacher/photos/catalog")
# ViT-Ti/16 at 224 pixels, the size of most clients.
_STUDENT = StudentConfig(image_size=224, patch_size=16, dim=192, depth=4, heads=3, dim_head=64, mlp_dim=768)


def measure_clients() -> None:
    """Record which mistakes of clients are named, with an untrained student of 224 pixels."""
    command = command_of("serving", "verify")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        catalog = build_catalog(CatalogConfig(reader="sample", output=str(folder / "catalog")))
        student = write_random_student(folder / "student", _STUDENT)
        graph = export_onnx(OnnxConfig(str(student), str(folder / "fp32"), images=1))
        figures, rows = measure_verify(graph, catalog, command)
    record("serving", figures, {"verify": rows})


def measure_pipelines() -> None:
    """Record recall of photographs as queries by other pipelines, with a distilled student of 160 pixels."""
    if not (_GRAPH / "card.json").is_file():
        raise UserError(f"{_GRAPH}: the student is missing. Run `make figures TOPIC=student PARTS=photos` first.")
    command = command_of("serving", "skew")
    with tempfile.TemporaryDirectory() as name:
        output = measure_skew(SkewConfig(str(_PHOTOS), str(_GRAPH), str(Path(name) / "skew")))
        rows = json.loads((output / "skew.json").read_text(encoding="utf-8"))["rows"]
    lost = {row["pipeline"]: row for row in rows}
    figures = [
        Figure(f"recall@1 lost by queries by {name}", row["drop"], "", None, "<=", command, row["drop_ci95"])
        for name, row in lost.items()
        if name in ("colour.bgr", "resize.bilinear-aliased", "normalisation.clip", "orientation.ignored")
    ]
    table: list[Row] = [
        {
            "queries by": row["pipeline"],
            "what differs": row["description"],
            "recall@1 [95 %]": f"{row['recall_at_1']:.3f}{interval_text(row['ci95'])}",
            "drop [95 %]": f"{row['drop']:+.3f}{interval_text(row['drop_ci95'], '+.3f')}",
            "cosine": f"{row['cosine_mean']:.4f}",
            "queries changed": f"{row['inputs_changed']:.0%}",
        }
        for row in rows
    ]
    record("serving", figures, {"skew": table})


PARTS = {"verify": measure_clients, "skew": measure_pipelines}

if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
