"""``make figures TOPIC=int8``: calibration, INT8 and engines, into ``docs/results/int8.json``.

Parts can be named (``make figures TOPIC=int8 PARTS="study"``); without any, all are measured. The students are
those of ``make figures TOPIC=student``, trained first where they are not there. Part ``tools`` needs
``make other-quantisers``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from experiments.figures import Figure, Row, command_of, measure, record, record_unmeasured
from experiments.int8.gpu_engines import gpu_engines, unmeasured
from experiments.int8.speed import cpu_speed
from experiments.int8.study import study
from experiments.int8.tools import TrainedStudent, compare_tools, own_graphs, within_budget
from experiments.student.figures import measure_grocery, measure_sizes
from export.config import TARGETS, EngineConfig
from export.tensorrt.bindings import this_gpu
from tests.reliability.fuzz.fuzz import FuzzConfig, fuzz, summarise
from vpr.common.hardware import read_gpus

_FOLDER = Path("runs/figures-int8")


def sample() -> TrainedStudent:
    """The size curve's student of under half the teacher's multiply-adds."""
    return TrainedStudent("sample", _of_the_curve(192), Path("runs/demo-full/catalog"), _FOLDER / "sample")


def grocery() -> TrainedStudent:
    """The default student of the ablation on photographs."""
    path = Path("runs/figures-student/grocery/cosine-queue-kl-seed0")
    if not (path / "card.json").is_file():
        measure_grocery()
    return TrainedStudent("grocery", path, Path("runs/figures-teacher/grocery/catalog"), _FOLDER / "grocery")


def larger() -> TrainedStudent:
    """The largest student of the size curve."""
    return TrainedStudent("larger", _of_the_curve(256), Path("runs/demo-full/catalog"), _FOLDER / "larger")


def _of_the_curve(width: int) -> Path:
    path = Path(f"runs/figures-student/sizes/width-{width}")
    if not (path / "card.json").is_file():
        measure_sizes()
    return path


def measure_tools() -> None:
    """Ours against other tools on three students."""
    figures: list[Figure] = []
    table: list[Row] = []
    for student in (sample(), grocery(), larger()):
        found, rows = compare_tools(student, command_of("int8", "tools"))
        figures, table = figures + found, table + rows
    record("int8", figures, {"tools": table})


def measure_study() -> None:
    """Number and choice of images, ranges, smoothing, correction."""
    record("int8", [], {"study": [row for student in (sample(), grocery()) for row in study(student)]})


def measure_budget() -> None:
    """INT8 decided on recall: what is found within half a point on validation, for each student."""
    rows: list[Row] = []
    for student in (sample(), grocery(), larger()):
        own_graphs(student)
        decision = json.loads((within_budget(student) / "decision.json").read_text(encoding="utf-8"))
        low, high = decision["drop_interval"]
        rows.append(
            {
                "student": student.name,
                "layers quantised": f"{len(decision['quantised'])} of {len(decision['layers'])}",
                "drop on validation [95 %]": f"{decision['drop']:+.4f} [{low:+.4f}, {high:+.4f}]",
                "sets tried": len(decision["trials"]),
                "ms, OpenVINO": ", ".join(f"{name}: {ms:.2f}" for name, ms in decision["latency_ms"].items()),
            }
        )
    record("int8", [], {"budget": rows})


def measure_speed() -> None:
    """ViT-S/16-224 on this CPU."""
    figures, table = cpu_speed(command_of("int8", "speed"))
    record("int8", figures, {"speed": table})


def measure_fuzz() -> None:
    """Files written wrong, given to every verb that reads them."""
    figures, table = summarise(fuzz(FuzzConfig()), command_of("int8", "fuzz"))
    record("int8", figures, {"fuzz": table})


def measure_gpu() -> None:
    """Engines of the sample's student on the GPU at hand, into ``gpu.json``; without one, that nothing is measured."""
    command = command_of("int8", "gpu")
    if not read_gpus()[0]:
        record_unmeasured(unmeasured(command), "the engines are")
        return
    gpu = this_gpu()
    record("gpu", *gpu_engines(sample(), gpu if gpu in TARGETS else EngineConfig.target, command))


PARTS = {
    "tools": measure_tools,
    "study": measure_study,
    "budget": measure_budget,
    "speed": measure_speed,
    "gpu": measure_gpu,
    "fuzz": measure_fuzz,
}


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
