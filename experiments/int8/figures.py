"""``make figures TOPIC=int8``: calibration, INT8 and engines, into ``docs/results/int8.json``.

``PARTS="study"`` measures this part only. The students are those of ``make figures TOPIC=student``, and are trained
first if they do not exist. Part ``tools`` needs ``make other-quantisers``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from experiments.figures import Figure, Row, command_of, measure, record, record_unmeasured
from experiments.int8.gpu_engines import gpu_engines, unmeasured
from experiments.int8.speed import cpu_speed
from experiments.int8.study import study
from experiments.int8.tools import TrainedStudent, compare_tools, export_graphs, within_budget
from experiments.student.figures import measure_grocery, measure_sizes
from export.config import TARGETS, EngineConfig
from export.tensorrt.bindings import this_gpu
from vpr.common.hardware import read_gpus

_FOLDER = Path("runs/figures-int8")


def sample() -> TrainedStudent:
    """Return the size curve's student of under half the teacher's multiply-adds."""
    return TrainedStudent("sample", _of_the_curve(192), Path("runs/demo-full/catalog"), _FOLDER / "sample")


def grocery() -> TrainedStudent:
    """Return the default student of the ablation on photographs."""
    path = Path("runs/figures-student/grocery/cosine-queue-kl-seed0")
    if not (path / "card.json").is_file():
        measure_grocery()
    return TrainedStudent("grocery", path, Path("runs/figures-teacher/grocery/catalog"), _FOLDER / "grocery")


def larger() -> TrainedStudent:
    """Return the largest student of the size curve."""
    return TrainedStudent("larger", _of_the_curve(256), Path("runs/demo-full/catalog"), _FOLDER / "larger")


def _of_the_curve(width: int) -> Path:
    path = Path(f"runs/figures-student/sizes/width-{width}")
    if not (path / "card.json").is_file():
        measure_sizes()
    return path


def measure_tools() -> None:
    """Record INT8 of this toolkit against other tools on three students."""
    figures: list[Figure] = []
    table: list[Row] = []
    for student in (sample(), grocery(), larger()):
        new_figures, rows = compare_tools(student, command_of("int8", "tools"))
        figures, table = figures + new_figures, table + rows
    record("int8", figures, {"tools": table})


def measure_study() -> None:
    """Record the study of images, ranges, smoothing and bias correction."""
    record("int8", [], {"study": [row for student in (sample(), grocery()) for row in study(student)]})


def measure_budget() -> None:
    """Record INT8 chosen on recall, within half a point on validation, for each student."""
    rows: list[Row] = []
    for student in (sample(), grocery(), larger()):
        export_graphs(student)
        decision = json.loads((within_budget(student) / "decision.json").read_text(encoding="utf-8"))
        rows.append(
            {
                "student": student.name,
                "layers quantised": f"{len(decision['quantised'])} of {len(decision['layers'])}",
                "result": decision["outcome"],
                "sets tried": len(decision["trials"]) + len(decision["sequence"]),
                "ms, OpenVINO": ", ".join(f"{name}: {ms:.2f}" for name, ms in decision["latency_ms"].items()),
            }
        )
    record("int8", [], {"budget": rows})


def measure_speed() -> None:
    """Record ViT-S/16-224 on this CPU."""
    figures, table = cpu_speed(command_of("int8", "speed"))
    record("int8", figures, {"speed": table})


def measure_gpu() -> None:
    """Record engines on this machine's GPU in ``gpu.json``; without a GPU, that they are not measured."""
    command = command_of("int8", "gpu")
    if not read_gpus()[0]:
        record_unmeasured(unmeasured(command), "engines")
        return
    gpu = this_gpu()
    record("gpu", *gpu_engines(sample(), gpu if gpu in TARGETS else EngineConfig.target, command))


PARTS = {
    "tools": measure_tools,
    "study": measure_study,
    "budget": measure_budget,
    "speed": measure_speed,
    "gpu": measure_gpu,
}


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
