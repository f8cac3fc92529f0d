"""The parts of the check in the order of their value, with their time."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.figures import Figure, Row
from experiments.gpu_check.driver import check_driver
from experiments.gpu_check.latency import COMMAND, Skipped, Variant, torch_latencies
from experiments.random_student import write_random_student
from experiments.student.training_step import Mode as StudentMode
from experiments.student.training_step import StudentStepConfig, student_step
from experiments.teacher.training_step import Mode as TeacherMode
from experiments.teacher.training_step import TeacherStepConfig, teacher_step
from student.config import StudentConfig
from vpr.common.errors import UserError
from vpr.inference.timing import summarise

__all__ = ["PARTS", "Part", "Results", "Skipped"]

Results = tuple[list[Figure], dict[str, list[Row]]]
BATCHES = (1, 8, 32, 128)
_STEPS, _WARMUP = 8, 3
_RUNTIME_SECONDS = 1.0  # of each batch size of a runtime


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: Name on the command line and in the table of outcomes.
        seconds: Most seconds that it may take.
        work: Function that yields results as soon as it has them; its argument is whether this is the rehearsal.
        runs_on_cpu: Whether the rehearsal runs it.
        is_compiled: Whether it compiles, so that a compiler must be installed.
    """

    name: str
    seconds: int
    work: Callable[[bool], Iterator[Results]]
    runs_on_cpu: bool = True
    is_compiled: bool = False


def measure_teacher(mode: TeacherMode, compiled: bool, batch: int, is_rehearsal: bool) -> Iterator[Results]:
    """Yield matrix products, images per second and utilisation of a training step of ViT-H-14."""
    if is_rehearsal:
        config = TeacherStepConfig("sample-vit", 10, (mode,), 2, steps=1, warmup=1, compile=compiled, device="cpu")
    else:
        config = TeacherStepConfig(modes=(mode,), batch=batch, steps=_STEPS, warmup=_WARMUP, compile=compiled)
    figures, tables = _largest_that_fits(teacher_step, config)
    # Each mode runs in its own part, and none may replace the table of another one.
    yield figures, {f"{name}-{mode}": rows for name, rows in tables.items()}


def measure_student(is_rehearsal: bool) -> Iterator[Results]:
    """Yield images per second of a distillation, with cached targets and then with the teacher in the loop."""
    batches: tuple[tuple[StudentMode, int], ...] = (("cached", 1024), ("online", 256))
    for mode, batch in batches:
        if is_rehearsal:
            config = StudentStepConfig("sample", "sample-vit", (mode,), 2, steps=1, warmup=1, device="cpu")
        else:
            config = StudentStepConfig(modes=(mode,), batch=batch, steps=_STEPS, warmup=_WARMUP)
        figures, tables = _largest_that_fits(student_step, config)
        yield figures, {f"{name}-{mode}": rows for name, rows in tables.items()}


def _largest_that_fits(measure: Callable[[Any], Results], config: Any) -> Results:
    """Measure a step at the batch of a configuration, or at half of it, and so on, where that does not fit."""
    while True:
        try:
            return measure(config)
        except UserError as error:
            if config.batch == 1 or not str(error).startswith("batch: "):
                raise
        gc.collect()
        config = replace(config, batch=config.batch // 2)


def measure_runtime(backend: str, is_rehearsal: bool) -> Iterator[Results]:
    """Yield latencies, from host array to host array, of a small student's FP16 graph or of an engine built from it."""
    from export.backends.base import BackendUnavailable
    from export.backends.registry import choose_backends, default_threads, models_of
    from export.config import OnnxConfig
    from export.tensorrt.kernel_cache import FOLDER_VARIABLE, NO_FOLDER
    from export.to_onnx import export_onnx

    if reason := choose_backends([backend])[0].missing():
        raise Skipped(reason)
    os.environ[FOLDER_VARIABLE] = NO_FOLDER  # nobody runs this engine again
    preset: Literal["sample", "small"] = "sample" if is_rehearsal else "small"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student = write_random_student(folder / "student", StudentConfig(preset, embedding_dim=256))
        artifact = export_onnx(OnnxConfig(str(student), str(folder / "fp16"), "fp16"))
        if not backend.startswith("onnxruntime"):
            artifact = _build_engine(artifact, folder / "engine", backend)
        model = models_of(artifact, [backend])[0]
        try:
            forward = model.open(default_threads())
        except BackendUnavailable as reason:
            raise Skipped(str(reason)) from None
        row: Row = {"model": f"{preset} student, fp16", "runtime": backend}
        row |= {f"ms, batch {batch}": "" for batch in BATCHES}
        for batch in BATCHES[:1] if is_rehearsal else BATCHES:
            x, times = model.random_input(batch), list[float]()
            for _ in range(3):
                forward(x)
            end = time.perf_counter() + _RUNTIME_SECONDS
            while time.perf_counter() < end or len(times) < 5:
                began = time.perf_counter()
                forward(x)
                times.append(1000 * (time.perf_counter() - began))
            p50 = summarise(np.array(times))["p50"]
            row[f"ms, batch {batch}"] = f"{p50:.3f}"
            figure = Figure(f"{preset} student, {backend} fp16, batch {batch}", p50, "ms", None, "<=", COMMAND)
            yield [figure], {f"gpu-check-{backend}": [dict(row)]}


def _build_engine(graph: Path, output: Path, backend: str) -> Path:
    from export.config import CURRENT_TARGET, EngineConfig
    from export.tensorrt.build import build_engine

    try:
        builder: Literal["tensorrt", "tensorrt-rtx"] = "tensorrt" if backend == "tensorrt" else "tensorrt-rtx"
        target = CURRENT_TARGET  # the default targets lack some GPUs
        config = EngineConfig(str(graph), str(output), builder, target, max_batch=max(BATCHES), batches=BATCHES)
        return build_engine(config)
    except UserError as error:
        raise Skipped(str(error)) from None


_EAGER = (Variant("fp16"), Variant("bf16"), Variant("tf32"), Variant("fp32"))
_COMPILED = (Variant("fp16", is_compiled=True),)

PARTS = (
    Part("driver-cuda-bindings", 30, partial(check_driver, "cuda-bindings"), runs_on_cpu=False),
    Part("driver-pycuda", 30, partial(check_driver, "pycuda"), runs_on_cpu=False),
    Part("teacher-full", 90, partial(measure_teacher, "full", False, 256)),
    Part("student-step", 75, measure_student),
    Part("student-latency", 45, partial(torch_latencies, "small", _EAGER, BATCHES)),
    Part("teacher-checkpointed", 75, partial(measure_teacher, "checkpointed", False, 256)),
    Part("teacher-compiled", 180, partial(measure_teacher, "full", True, 256), is_compiled=True),
    Part("student-compiled-latency", 120, partial(torch_latencies, "small", _COMPILED, BATCHES), is_compiled=True),
    Part("vit-b-latency", 40, partial(torch_latencies, "ViT-B-16", _EAGER, BATCHES)),
    Part("vit-h-latency", 60, partial(torch_latencies, "ViT-H-14", _EAGER, BATCHES)),
    Part("onnxruntime-cuda", 45, partial(measure_runtime, "onnxruntime-cuda"), runs_on_cpu=False),
    Part("tensorrt", 90, partial(measure_runtime, "tensorrt"), runs_on_cpu=False),
    Part("tensorrt-rtx", 60, partial(measure_runtime, "tensorrt-rtx"), runs_on_cpu=False),
    Part("vit-b-compiled-latency", 120, partial(torch_latencies, "ViT-B-16", _COMPILED, BATCHES), is_compiled=True),
)
