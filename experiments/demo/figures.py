"""``make figures TOPIC=demo``: figures of the demo, into ``docs/results/demo.json``.

``PARTS="demo full"`` measures these parts only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from app.config import DemoConfig
from app.demo import demo, read_times
from benchmarks.config import RecallConfig
from benchmarks.recall.measure import measure_recall
from benchmarks.report.schema import Row as ReportRow
from benchmarks.report.tables import main_columns
from experiments.demo.interrupted import interrupt
from experiments.demo.seeds import measure_seeds
from experiments.figures import RESULTS, ROOT, Figure, Row, command_of, measure, record
from student.model import load_student
from teacher.model import load_teacher
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.inference.model_size import count_multiply_adds, count_parameters

# Relative, as in the demo: paths are part of an artifact's configuration.
_DEMO, _FULL = Path("runs/demo"), Path("runs/demo-full")
_MODELS = ("teacher", "student", "fp32", "fp16", "int8", "int8-cpu", "engine-fp16", "engine-int8")


def measure_demo() -> None:
    """Record recall, precision, speed and times of the demo, and of its second run."""
    demo(DemoConfig(str(_DEMO)))
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "vpr", "demo"], cwd=ROOT, check=True)
    second = time.monotonic() - start
    rows = _rows(_DEMO)
    command = "make demo"
    times = read_times(_DEMO)
    figures = [
        *_time_figures(times["total"]),
        Figure("demo, second run", round(second, 1), "s", 60, "<=", command),
        *_recalls("demo", rows, 0.60, command),
        *_precisions(rows, command),
        *_sizes(_DEMO, command),
        Figure(
            "INT8 on OpenVINO against torch eager, batch 1, times faster",
            _milliseconds(rows, "student", "torch") / _milliseconds(rows, "int8", "openvino"),
            "",
            2,
            ">=",
            command,
        ),
    ]
    record("demo", figures, {"demo": _table(rows), "steps": _steps(times["steps"])})


def measure_recalls() -> None:
    """Record recall and training time of the demo, and keep the recorded latencies of artifacts of the same size."""
    models = tuple(str(_DEMO / name) for name in _MODELS)
    folder = measure_recall(RecallConfig(str(_DEMO / "catalog"), models, str(_DEMO / "recall-all")))
    rows = json.loads((folder / "recall.json").read_text(encoding="utf-8"))
    recorded = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))["tables"]["demo"]
    table = []
    for old, new in zip(recorded, _table(rows), strict=True):
        if any(old[key] != new[key] for key in ("model", "backend", "MB")):
            raise UserError(f"{old['model']}: the artifact is not the one that was timed. Measure PARTS=demo.")
        table.append({key: old[key] if key.startswith("ms, ") else new[key] for key in old})
    times, command = read_times(_DEMO), command_of("demo", "recall")
    figures = [*_recalls("demo", rows, 0.60, command), *_time_figures(times["total"])]
    record("demo", figures, {"demo": table, "steps": _steps(times["steps"])})


def record_seeds() -> None:
    """Record recall of teacher, student and INT8 with three seeds."""
    record("demo", [], {"seeds": measure_seeds(_DEMO)})


def measure_full() -> None:
    """Record recall and time of the long demo."""
    demo(DemoConfig(str(_FULL), full=True))
    times, rows, command = read_times(_FULL), _rows(_FULL), "make demo-full"
    figures = [Figure("demo-full", times["total"], "s", 3600, "<=", command)]
    figures += _recalls("demo-full", rows, 0.85, command)
    record("demo", figures, {"demo-full": _table(rows), "steps-full": _steps(times["steps"])})


def measure_interrupted() -> None:
    """Record a teacher's training killed half-way and resumed, against an uninterrupted one."""
    stages = ("{train: head, epochs: 1, lr_head: 2.0e-3}", "{train: all, epochs: 3, lr_head: 2.0e-3, lr_tower: 2.0e-3}")
    arguments = ["--recipe", "sample", "--stages", *stages]
    with tempfile.TemporaryDirectory() as folder:
        interruption = interrupt(
            "teacher train", [*arguments, "--catalog", str(_DEMO / "catalog")], Path(folder), epochs=4
        )
    expected, resumed = interruption.unbroken.card, interruption.resumed.card
    command = command_of("demo", "interrupted")
    steps = abs(resumed.metrics["steps"] - expected.metrics["steps"])
    recall = abs(resumed.metrics["val_recall_at_1"] - expected.metrics["val_recall_at_1"])
    same = resumed.files["model.safetensors"] == expected.files["model.safetensors"]
    figures = [
        _at_most("kill -9: difference of final steps", steps, 0, command),
        _at_most("kill -9: difference of recall@1", recall, 0.02, command),
        Figure("kill -9: weights equal bit for bit (1 is yes)", float(same), "", None, ">=", command),
    ]
    record("demo", figures, {})


def measure_vit_h() -> None:
    """Record one head-only step and one embedding of ViT-H-14, as in the slow test."""
    start = time.monotonic()
    passed = _pytest("tests/teacher/test_model.py", "-m", "slow", "-k", "vit_h_14")
    seconds = round(time.monotonic() - start, 1) if passed == 1 else None
    command = "make test-all"
    record(
        "demo", [Figure("ViT-H-14 created, one head step, one embedding, CPU", seconds, "s", None, "<=", command)], {}
    )


def measure_bad_input() -> None:
    """Record how many kinds of bad input end with exit code 2 and a one-line message with its remedy."""
    passed = _pytest(
        "tests/vpr/test_cli.py", "-k", "truncated or text or empty or column or unknown or edited or newer"
    )
    record("demo", [Figure("kinds of bad input rejected in one line", float(passed), "", 7, ">=", "make test")], {})


PARTS = {
    "demo": measure_demo,
    "recall": measure_recalls,
    "seeds": record_seeds,
    "full": measure_full,
    "interrupted": measure_interrupted,
    "vit-h": measure_vit_h,
    "bad-input": measure_bad_input,
}


def _time_figures(seconds: float | None) -> list[Figure]:
    """Return the seconds of a full demo, alone and with the installation that came before it."""
    stamp, command = ROOT / ".venv" / ".installed", "make demo"
    installed = float(stamp.read_text()) if stamp.is_file() and stamp.read_text().strip() else None
    total = None if installed is None or seconds is None else installed + seconds
    return [
        Figure("demo from nothing, with installation", total, "s", 900, "<=", command),
        Figure("demo after installation", seconds, "s", 600, "<=", command),
    ]


def _recalls(name: str, rows: list[Row], goal: float, command: str) -> list[Figure]:
    teacher, student = _row(rows, "teacher", "torch"), _row(rows, "student", "torch")
    raw = _row(rows, "raw-pixels", None)
    ratio = teacher["recall_at_1"] / raw["recall_at_1"]
    named = (("raw pixels", raw), ("teacher", teacher), ("student", student))
    return [
        *[
            Figure(f"{name}: {model} recall@1", row["recall_at_1"], "", None, ">=", command, tuple(row["ci95"]), (0,))
            for model, row in named
        ],
        Figure(f"{name}: teacher over raw pixels", ratio, "times", 6, ">=", command, None, (0,)),
        Figure(f"{name}: retention of the student", student["retention"], "", goal, ">=", command, None, (0,)),
    ]


def _precisions(rows: list[Row], command: str) -> list[Figure]:
    fp32 = load_artifact(_DEMO / "fp32").card.metrics
    figures = [_at_most("ONNX FP32 against torch, max abs, 64 images, batch 1, 3, 8", fp32["max_abs"], 1e-4, command)]
    student = _row(rows, "student", "torch")["recall_at_1"]
    for name, title, cosine, drop in (("fp16", "FP16", 0.9999, 0.01), ("int8", "INT8", 0.99, 0.02)):
        row = _row(rows, name, "onnxruntime-cpu")
        figures.append(Figure(f"{title} graph: mean cosine to FP32", row["cosine_mean"], "", cosine, ">=", command))
        figures.append(_at_most(f"{title} graph: change of recall@1", abs(row["recall_at_1"] - student), drop, command))
    return figures


def _sizes(folder: Path, command: str) -> list[Figure]:
    teacher, teacher_card = load_teacher(folder / "teacher")
    student, student_card = load_student(folder / "student")
    assert teacher_card.card.preprocess is not None
    assert student_card.card.preprocess is not None
    adds = count_multiply_adds(teacher, teacher_card.card.preprocess.size)
    student_adds = count_multiply_adds(student, student_card.card.preprocess.size)
    parameters = count_parameters(teacher)
    return [
        Figure("teacher parameters", parameters / 1e6, "M", None, "<=", command),
        Figure("student parameters", count_parameters(student) / 1e6, "M", parameters / 1e6, "<=", command),
        Figure("teacher multiply-adds", adds / 1e6, "M", None, "<=", command),
        Figure("student multiply-adds", student_adds / 1e6, "M", adds / 1e6, "<=", command),
    ]


def _at_most(name: str, value: float, goal: float, command: str) -> Figure:
    return Figure(name, float(value), "", goal, "<=", command)


def _rows(folder: Path) -> list[Row]:
    return json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))["rows"]


def _row(rows: list[Row], name: str, backend: str | None) -> Row:
    return next(row for row in rows if row["name"] == name and row["backend"] == backend)


def _milliseconds(rows: list[Row], name: str, backend: str) -> float:
    latency = ReportRow.model_validate(_row(rows, name, backend)).milliseconds("1")
    assert latency is not None
    return latency


def _table(rows: list[Row]) -> list[Row]:
    report_rows = [ReportRow.model_validate(row) for row in rows]
    columns = main_columns(report_rows)
    return [{column.heading: column.text(row) for column in columns} for row in report_rows]


def _steps(seconds: dict[str, float]) -> list[Row]:
    return [{"step": name, "seconds": value} for name, value in seconds.items()]


def _pytest(*arguments: str) -> int:
    """Return the number of passed tests; 0 if any failed."""
    command = [sys.executable, "-m", "pytest", *arguments]
    process: Any = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    passed = re.search(r"(\d+) passed", process.stdout)
    return int(passed.group(1)) if passed and process.returncode == 0 else 0


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
