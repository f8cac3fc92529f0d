"""``vpr demo``: the full pipeline on the embedded sample, one command after another, each timed."""

import json
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.config import DemoConfig
from benchmarks.report.schema import Row, read_report
from vpr.cli import run
from vpr.common.log import get_logger

log = get_logger(__name__)

_BUDGET = "0.03"  # drop of recall@1 that the 33 confirmation products of the sample can confirm


@dataclass(frozen=True)
class Step:
    """One command of the pipeline, and the artifact that it writes."""

    name: str
    arguments: tuple[str, ...]
    output: str


def steps(folder: str, full: bool) -> list[Step]:
    """Return the commands of the demo, as a user would type them."""
    recipe = "sample-full" if full else "sample"

    def at(name: str) -> str:
        return f"{folder}/{name}"

    def step(name: str, command: str, output: str, *words: str, **options: str) -> Step:
        flags = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
        return Step(name, (*command.split(), *words, *flags, "--output", at(output)), at(output))

    catalog = at("catalog")
    eight = {"onnx": at("fp32"), "ranges": at("ranges")}
    pipeline = [
        step("catalogue", "catalog", "catalog", reader="sample"),
        step("teacher", "teacher train", "teacher", recipe=recipe, catalog=catalog),
        step("student", "student distill", "student", recipe=recipe, teacher=at("teacher"), catalog=catalog),
        step("ONNX FP32", "export onnx", "fp32", student=at("student"), catalog=catalog),
        step("ONNX FP16", "export onnx", "fp16", student=at("student"), catalog=catalog, precision="fp16"),
        step("calibration", "calibrate", "ranges", onnx=at("fp32"), catalog=catalog),
        step("INT8 over FP16", "export int8", "int8", **eight, catalog=catalog, max_recall_drop=_BUDGET),
        step("INT8 over FP32", "export int8", "int8-cpu", **eight, base="fp32"),
        step("engine FP16", "export engine", "engine-fp16", onnx=at("fp16")),
        step("engine INT8", "export engine", "engine-int8", onnx=at("int8")),
    ]
    names = ("teacher", "student", "fp32", "fp16", "int8", "int8-cpu", "engine-fp16", "engine-int8")
    models = ("--models", *map(at, names))
    budget = {"ranges": at("ranges"), "drop": _BUDGET}
    pipeline.append(step("report", "bench report", "report", *models, catalog=catalog, **budget))
    return pipeline


def demo(config: DemoConfig) -> Path:
    """Run every step that is not up to date, and print the report's table and the address of its page."""
    folder = Path(config.output or ("runs/demo-full" if config.full else "runs/demo"))
    start = time.monotonic()
    seconds = read_times(folder)["steps"]
    pipeline = steps(str(folder), config.full)
    executed = 0
    for number, step in enumerate(pipeline, start=1):
        log.info(f"\n[{number}/{len(pipeline)}] vpr {shlex.join(step.arguments)}")
        card_time, step_start = _card_time(step), time.monotonic()
        run(step.arguments)
        if _card_time(step) != card_time:
            executed += 1
            seconds[step.name] = round(time.monotonic() - step_start, 1)
            _write_times(folder, seconds, None)
    total = time.monotonic() - start
    if executed == len(pipeline):
        _write_times(folder, seconds, round(total, 1))
    report = Path(pipeline[-1].output)
    _print_table(read_report(report).rows, seconds)
    log.info(f"{report}/report.html: open it in a browser ({total:.0f} s in all)")
    return report


def read_times(folder: Path) -> dict[str, Any]:
    """Return the seconds of each step when it last ran (``steps``) and of the last full demo (``total``, or None)."""
    path = folder / "times.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"steps": {}, "total": None}


def _card_time(step: Step) -> int | None:
    card = Path(step.output) / "card.json"
    return card.stat().st_mtime_ns if card.is_file() else None


def _write_times(folder: Path, seconds: dict[str, float], total: float | None) -> None:
    partial = folder / "times.json.partial"
    partial.write_text(json.dumps({"steps": seconds, "total": total}, indent=1), encoding="utf-8")
    os.replace(partial, folder / "times.json")


def _format_recall(row: Row) -> str:
    if row.recall_at_1 is None:
        return "-"
    return f"{row.recall_at_1:.3f}" + (f" [{row.ci95[0]:.3f}, {row.ci95[1]:.3f}]" if row.ci95 else "")


def _print_table(rows: list[Row], seconds: dict[str, float]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "backend", "precision", "recall@1 [95 %]", "retention", "ms, batch 1", "MB"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        milliseconds = row.milliseconds("1")
        table.add_row(
            row.name,
            row.backend or "",
            row.precision or "",
            _format_recall(row),
            "-" if row.retention is None else f"{row.retention:.2f}",
            "-" if milliseconds is None else f"{milliseconds:.2f}",
            "-" if row.size_bytes is None else f"{row.size_bytes / 1e6:.1f}",
        )
    console = Console(width=max(110, Console().width))
    console.print(table)
    step_times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    console.print(f"time of each step: {step_times}", soft_wrap=True, highlight=False)
