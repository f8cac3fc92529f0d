"""``make figures TOPIC=serving``: clients and their preprocessing, into ``docs/results/serving.json``.

Parts: ``verify``, ``skew``, ``graphs``, ``uint8``, ``bulk``, ``allocator``. ``skew`` and ``graphs`` distil a student of
photographs and need the environment variable ``VPR_DATA``; ``graphs`` also needs ``make demo`` and ``make
oldest-runtime``. Run nothing else on the machine during ``uint8``, ``bulk`` and ``allocator``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.config import SkewConfig
from benchmarks.recall.skew import measure_skew
from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.data.scale import write_images
from experiments.figures import Figure, Row, command_of, measure, record
from experiments.intervals import interval_text
from experiments.random_student import write_random_student
from experiments.random_teacher import write_random_teacher
from experiments.serving.graphs import compare_runtimes
from experiments.serving.speed import compare_allocators, compare_inputs, export_inputs, measure_bulk
from experiments.serving.verify_table import measure_verify
from experiments.student.candidates import DEFAULT
from experiments.student.figures import grocery_trial
from export.config import Int8Config, OnnxConfig
from export.int8 import export_int8
from export.to_onnx import export_onnx
from student.config import StudentConfig
from teacher.config import TowerConfig
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig

_DEMO = Path("runs/demo")
# Four blocks of ViT-Ti/16 at 224 pixels, the size of most clients.
_STUDENT = StudentConfig(
    image_size=224, patch_size=16, dim=192, depth=4, heads=3, dim_head=64, mlp_dim=768, embedding_dim=256
)
_BULK_IMAGES = 4000
_TEACHERS = {"EfficientNet-Lite2": "tf_efficientnet_lite2", "ResNet-50": "resnet50", "ViT-B/16": "vit_base_patch16_224"}


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


def measure_uint8() -> None:
    """Record graphs that take uint8 pixels beside those that take floats."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        catalog = build_catalog(CatalogConfig(reader="sample", output=str(folder / "catalog")))
        student = write_random_student(folder / "student", _STUDENT)
        graphs = export_inputs(student, str(folder / "catalog"), folder)
        figures, rows = compare_inputs(graphs, load_catalog(str(catalog)), (1, 8), 10, command_of("serving", "uint8"))
    record("serving", figures, {"uint8": rows})


def measure_bulk_embedding() -> None:
    """Record ``vpr embed`` with an INT8 graph on JPEGs of 500 pixels, beside decoding and the model alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", _BULK_IMAGES, side=500)
        catalog = folder / "catalog"
        build_catalog(CatalogConfig(reader="folder", root=str(folder / "images"), output=str(catalog)))
        student = write_random_student(
            folder / "student", StudentConfig(preset="sample", image_size=96, embedding_dim=256)
        )
        fp32 = export_onnx(OnnxConfig(str(student), str(folder / "fp32"), images=1))
        ranges = calibrate(CalibrateConfig(str(fp32), str(catalog), str(folder / "ranges")))
        graph = export_int8(Int8Config(str(fp32), str(ranges), str(folder / "int8"), base="fp32"))
        figures, rows = measure_bulk(Path(graph), catalog, folder, 3, command_of("serving", "bulk"))
    record("serving", figures, {"bulk": rows})


def measure_graphs() -> None:
    """Record INT8 graphs of trained students on every runtime, against ONNX's reference evaluator."""
    if not (_DEMO / "student" / "card.json").is_file():
        raise UserError(f"{_DEMO / 'student'}: it does not exist. Run `make demo`.")
    students = {"sample": (_DEMO / "student", _DEMO / "catalog"), "photographs": _distil_photographs("graphs")}
    with tempfile.TemporaryDirectory() as name:
        command = command_of("serving", "graphs")
        figures, rows = compare_runtimes(students, Path(name), 8, command, oldest=".venv-oldest-runtime")
    record("serving", figures, {"graphs": rows})


def measure_allocator() -> None:
    """Record teachers of convolutions and of attention with and without the allocator's setting."""
    with tempfile.TemporaryDirectory() as name:
        teachers = {
            title: write_random_teacher(Path(name) / title, TowerConfig(name=f"timm/{tower}", pretrained=""))
            for title, tower in _TEACHERS.items()
        }
        figures, rows = compare_allocators(teachers, 32, command_of("serving", "allocator"))
    record("serving", figures, {"allocator": rows})


def measure_pipelines() -> None:
    """Record recall of photographs as queries by other pipelines, with a distilled student of 96 pixels."""
    student, catalog = _distil_photographs("skew")
    command = command_of("serving", "skew")
    with tempfile.TemporaryDirectory() as name:
        graph = export_onnx(OnnxConfig(str(student), str(Path(name) / "fp32"), images=1))
        output = measure_skew(SkewConfig(str(catalog), str(graph), str(Path(name) / "skew")))
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


def _distil_photographs(part: str) -> tuple[Path, Path]:
    """Return the student of photographs by the default recipe and their catalogue; a finished student is reused."""
    trial = grocery_trial(part)
    return trial.train(DEFAULT, 0), trial.setting.catalog


PARTS = {
    "verify": measure_clients,
    "skew": measure_pipelines,
    "uint8": measure_uint8,
    "bulk": measure_bulk_embedding,
    "allocator": measure_allocator,
    "graphs": measure_graphs,
}

if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
