"""``make figures TOPIC=student``: the student's figures, into ``benchmarks/results/student.json``.

Parts can be named (``make figures TOPIC=student PARTS="grocery"``); without any, all are measured. The
photographs of ``grocery`` lie in the folder that the environment variable ``VPR_DATA`` names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.ablation import build_grocery, grocery_teacher
from benchmarks.ablation_student import Setting, ablate_students
from benchmarks.figures import ROOT, record
from teacher.train import TrainConfig, train
from vpr.catalog import CatalogConfig, build_catalog
from vpr.cli import quieten, read_config
from vpr.console import say
from vpr.errors import UserError

# Relative: paths are part of an artifact's configuration.
_FOLDER, _FULL = Path("runs/figures-student"), Path("runs/demo-full")


def sample() -> Setting:
    """The demo's furniture renders and the teacher of its long form."""
    catalog = build_catalog(CatalogConfig("sample", str(_FULL / "catalog")))
    teacher = _teacher("sample-full", catalog, _FULL / "teacher")
    return Setting("sample", teacher, catalog, _FOLDER / "sample", 8, 8, _command("sample"))


def grocery() -> Setting:
    """Photographs of groceries; the teacher starts from the demo's, which stands for CLIP's weights."""
    data = os.environ.get("VPR_DATA")
    if not data:
        raise UserError("VPR_DATA is not set: it names the folder that holds 'grocery', see README.md")
    folder = Path("runs/figures-teacher/grocery")
    catalog = build_grocery(Path(data), folder)
    pretrained = _teacher("sample", build_catalog(CatalogConfig("sample", "runs/demo/catalog")), "runs/demo/teacher")
    teacher = grocery_teacher(folder, pretrained, _FOLDER / "grocery-teacher")
    return Setting("grocery", teacher, catalog, _FOLDER / "grocery", 24, 24, _command("grocery"), batch=64)


def measure_sample() -> None:
    """The ablation on furniture renders."""
    figures, table = ablate_students(sample())
    record("student", figures, {"sample": table})


def measure_grocery() -> None:
    """The ablation on photographs of products that no stage has seen."""
    figures, table = ablate_students(grocery())
    record("student", figures, {"grocery": table})


PARTS = {"sample": measure_sample, "grocery": measure_grocery}


def _teacher(recipe: str, catalog: Path, output: Path | str) -> Path:
    arguments = ["--config", str(ROOT / f"teacher/recipes/{recipe}.yaml"), "--catalog", str(catalog)]
    path = train(read_config(TrainConfig, "teacher train", [*arguments, "--output", str(output)]))
    assert path is not None
    return path


def _command(part: str) -> str:
    return f'make figures TOPIC=student PARTS="{part}"'


if __name__ == "__main__":
    os.chdir(ROOT)
    quieten()
    chosen = sys.argv[1:] or list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        raise SystemExit(f"error: no part '{unknown[0]}': choose from {', '.join(PARTS)}")
    for part in chosen:
        say(f"measuring {part}")
        PARTS[part]()
