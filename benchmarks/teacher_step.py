"""The teacher's training step on a GPU: images per second, and the share of the GPU's arithmetic that it uses.

``python -m benchmarks.teacher_step`` measures ViT-H-14 at the largest batch that fits and keeps the figures in
``benchmarks/results/gpu.json``. ``--device cpu --tower sample-vit --batch 8`` runs the same code anywhere.

The step is the training's own: views, normalisation, tower, margin head, gradient, clipping, AdamW, under bf16
autocast. Model FLOP utilisation is that of Chowdhery et al., "PaLM", 2022, appendix B: what the model needs and not
what was computed (activations that checkpointing computes again do not count), over a ceiling measured here.
"""

from __future__ import annotations

import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figures import Figure, Row, record
from teacher.head import HeadConfig, MarginHead
from teacher.layers import trainable
from teacher.model import TowerConfig, build_teacher, read_tower
from vpr.cli import quieten
from vpr.console import say
from vpr.errors import UserError
from vpr.loading import Normalise
from vpr.training import RunConfig, decay_groups
from vpr.views import ViewConfig, apply_views, draw_views

Mode = Literal["head", "full"]
Matmul = tuple[int, int, int]
_LABELS: dict[Mode, str] = {"head": "head-only step", "full": "full step with gradient checkpointing"}
_PER_CLASS = 15  # pictures; the margin's size depends on it, its cost does not


@dataclass(frozen=True)
class TeacherStepConfig:
    """What to measure.

    Attributes:
        tower: an open_clip model, or a JSON file or name as of ``vpr teacher train``.
        classes: of the margin head.
        modes: ``head`` trains the class directions alone, ``full`` everything.
        batch: pictures per step; 0 finds the largest that fits (only on a GPU).
        most: largest batch that is tried.
        steps: that are timed.
        warmup: steps before them.
        compile: compile the tower; the batch is found before.
        device: ``cuda`` or ``cpu``.
        record: keep the figures; by default those of a GPU are kept.
    """

    tower: str = "ViT-H-14"
    classes: int = 10300
    modes: tuple[Mode, ...] = ("head", "full")
    batch: int = 0
    most: int = 4096
    steps: int = 20
    warmup: int = 5
    compile: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    record: bool | None = None

    def __post_init__(self) -> None:
        least = {"classes": 2, "batch": 0, "most": 1, "steps": 1, "warmup": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"{name}: {getattr(self, name)}: give {value} or more")
        if not self.modes:
            raise UserError("modes: none: give [head], [full] or both")
        if self.device == "cpu" and not self.batch:
            raise UserError("batch: 0 fills the memory of a GPU: with --device cpu, give a batch such as --batch 8")

    @property
    def command(self) -> str:
        """What measures this again."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in changed.items()}
        return " ".join(["python -m benchmarks.teacher_step", *(f"--{n} {shlex.quote(t)}" for n, t in texts.items())])


@dataclass(frozen=True)
class Measured:
    """A training step's cost.

    Attributes:
        mode: what trained.
        batch: pictures per step.
        seconds: of a step, median.
        flops: of one picture, see :func:`step_flops`.
        peak_bytes: most memory allocated on the GPU; None on the CPU.
    """

    mode: Mode
    batch: int
    seconds: float
    flops: int
    peak_bytes: int | None

    @property
    def images_per_second(self) -> float:
        """Pictures trained on in a second."""
        return self.batch / self.seconds

    def utilisation(self, ceiling: float) -> float:
        """Model FLOP utilisation, a share of ``ceiling`` FLOP/s."""
        return self.images_per_second * self.flops / ceiling


class TrainingStep:
    """The training's step on random pictures.

    Args:
        mode: what trains.
        config: tower, classes and device.
    """

    def __init__(self, mode: Mode, config: TeacherStepConfig) -> None:
        # The frozen tower keeps nothing for a backward pass, so there is nothing to compute again.
        tower = TowerConfig(config.tower, "", gradient_checkpointing=mode == "full")
        self.teacher, self.preprocess = build_teacher(tower, read_tower(config.tower), False, config.device)
        counts = torch.full((config.classes,), _PER_CLASS)
        self.head = MarginHead(self.teacher.embedding_dim, counts, HeadConfig()).to(config.device)
        self.normalise = Normalise(self.preprocess).to(config.device)
        self.device, self.classes = torch.device(config.device), config.classes
        self.teacher.eval()
        for part in trainable(self.teacher, "head" if mode == "head" else "all"):
            part.train()
        self.learning = [p for p in [*self.teacher.parameters(), *self.head.parameters()] if p.requires_grad]
        groups = decay_groups(self.learning, 1e-5, 0.01)
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type == "cuda")
        self.set_batch(1)

    def set_batch(self, batch: int) -> None:
        """Make other pictures, so many."""
        size = self.preprocess.size
        self.rows = torch.arange(batch)
        self.pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=self.device)
        self.labels = torch.randint(0, self.classes, (batch,), device=self.device)

    def __call__(self, number: int) -> None:
        """Train on the pictures, in other views each time."""
        views = draw_views(ViewConfig(), 0, self.rows, torch.full_like(self.rows, number))
        with torch.autocast(self.device.type, torch.bfloat16):
            embeddings = self.teacher(self.normalise(apply_views(self.pixels, views)))
            loss = self.head(embeddings, self.labels, 0.0, 0)
        loss.backward()
        nn.utils.clip_grad_norm_(self.learning, RunConfig().clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fits(self, batch: int) -> bool:
        """Whether two steps of this batch run (the second has the optimiser's states from its start)."""
        try:
            self.set_batch(batch)
            for number in range(2):
                self(number)
            fit = True
        except torch.OutOfMemoryError:
            fit = False
        # Only here, when the error no longer holds the frames that hold the activations, can they be freed.
        self.optimizer.zero_grad()
        self.set_batch(1)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fit


def count_flops(teacher: nn.Module, size: int) -> int:
    """FLOPs of a forward pass of one picture of ``size`` pixels, a multiply-add counted as two.

    Args:
        teacher: on the ``meta`` device, in evaluation mode: nothing is computed.
        size: side of the picture.
    """
    # The plain attention is made of matrix products, which the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher(torch.empty(1, 3, size, size, device="meta"))
    return int(counter.get_total_flops())


def step_flops(tower: int, head: int, mode: Mode) -> int:
    """FLOPs that a training step needs for one picture: a forward pass, and twice that backward for what learns.

    Args:
        tower: FLOPs of its forward pass.
        head: likewise of the class directions.
        mode: what learns.
    """
    return 3 * head + (3 * tower if mode == "full" else tower)


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to ``most`` that fits: doubled until one does not, then halfway between.

    Up to 63 it is exact, above it is at most 1/32 too small, which saves trials that take long.

    Raises:
        UserError: a single picture does not fit.
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    if not good:
        raise UserError("batch: not even one picture fits into the GPU's memory: take a smaller --tower")
    bad = min(bad, most + 1)
    while bad - good > max(1, good // 32):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def time_steps(step: Callable[[int], object], steps: int, warmup: int, device: str) -> float:
    """Median seconds of ``step(number)``; on a GPU between events, so that its queue never runs empty."""
    for number in range(warmup):
        step(number)
    if device == "cpu":
        times = [time.perf_counter()]
        for number in range(steps):
            step(warmup + number)
            times.append(time.perf_counter())
        return statistics.median(after - before for before, after in zip(times, times[1:], strict=False))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for number in range(steps):
        step(warmup + number)
        events[number + 1].record()
    torch.cuda.synchronize()
    pairs = zip(events, events[1:], strict=False)
    return statistics.median(before.elapsed_time(after) / 1000 for before, after in pairs)


def matmul_shapes(teacher: nn.Module, device: str) -> list[Matmul]:
    """(m, k, n) products to try: squares, and many tokens times each of the tower's four largest matrices."""
    sides, tokens = ((4096, 8192, 16384), 16384) if device == "cuda" else ((256, 512), 512)
    matrices = {(p.shape[1], p.shape[0]) for p in teacher.parameters() if p.ndim == 2}
    largest = sorted(matrices, key=lambda shape: (shape[0] * shape[1], shape))[-4:]
    return [*((side, side, side) for side in sides), *((tokens, k, n) for k, n in largest)]


def matmul_rate(shape: Matmul, device: str, repeats: int = 100) -> float:
    """FLOP/s of a bf16 matrix product of normal random numbers (a GPU multiplies zeros faster, at less power)."""
    m, k, n = shape
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    seconds = time_steps(lambda _: nn.functional.linear(x, weight), repeats, repeats // 10, device)
    return 2 * m * k * n / seconds


def measure(mode: Mode, config: TeacherStepConfig, tower_flops: int) -> Measured:
    """Measure one mode.

    Raises:
        UserError: the batch does not fit.
    """
    step = TrainingStep(mode, config)
    batch = config.batch or largest_batch(step.fits, config.most)
    head_flops = 2 * config.classes * step.teacher.embedding_dim
    if config.compile:
        step.teacher.compile(dynamic=False)
    gpu = config.device == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        step.set_batch(batch)
        seconds = time_steps(step, config.steps, config.warmup, config.device)
    except torch.OutOfMemoryError:
        raise UserError(
            f"batch: {batch} pictures of {config.tower} ({mode}) do not fit: give a smaller --batch"
        ) from None
    peak = torch.cuda.max_memory_allocated() if gpu else None
    return Measured(mode, batch, seconds, step_flops(tower_flops, head_flops, mode), peak)


def teacher_step(config: TeacherStepConfig) -> tuple[list[Figure], dict[str, list[Row]]]:
    """Measure the ceiling and every mode: figures of topic ``gpu``, and the tables behind them.

    Raises:
        UserError: there is no GPU, or the batch does not fit.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device: cuda: PyTorch finds no GPU here: run it where there is one, "
            "or try the code with --device cpu --tower sample-vit --batch 8"
        )
    shadow, preprocess = build_teacher(TowerConfig(config.tower, ""), read_tower(config.tower), False, "meta")
    tower_flops = count_flops(shadow.eval(), preprocess.size)
    rates = {shape: matmul_rate(shape, config.device) for shape in matmul_shapes(shadow, config.device)}
    ceiling = max(rates.values())
    say(f"{config.tower}: {tower_flops / 1e9:.1f} GFLOP forward; matrix products reach {ceiling / 1e12:.4g} TFLOP/s")
    steps = []
    for mode in config.modes:
        steps.append(measure(mode, config, tower_flops))
        gc.collect()  # the network of this mode, before the next one is made
        say(f"{_LABELS[mode]}: {_step_row(steps[-1], ceiling)}")
    suffix = "-compiled" if config.compile else ""
    products = [{"m": m, "k": k, "n": n, "TFLOP/s": f"{rate / 1e12:.4g}"} for (m, k, n), rate in rates.items()]
    tables = {
        f"teacher-step{suffix}": [_step_row(step, ceiling) for step in steps],
        f"teacher-step-matmul{suffix}": products,
    }
    return _figures(config, steps, ceiling), tables


def unmeasured(config: TeacherStepConfig) -> list[Figure]:
    """The figures of a machine without a GPU: their names and goals, and no values."""
    return [figure for mode in config.modes for figure in _mode_figures(config, mode, None, None)]


def _figures(config: TeacherStepConfig, steps: list[Measured], ceiling: float) -> list[Figure]:
    figures = [Figure("bf16 matrix product, the fastest", ceiling / 1e12, "TFLOP/s", None, ">=", config.command)]
    for step in steps:
        figures += _mode_figures(config, step.mode, step.images_per_second, 100 * step.utilisation(ceiling))
    return figures


def _mode_figures(config: TeacherStepConfig, mode: Mode, rate: float | None, use: float | None) -> list[Figure]:
    label = f"{config.tower}{', compiled' if config.compile else ''}, {_LABELS[mode]}"
    goal = 45.0 if (config.tower, mode) == ("ViT-H-14", "full") else None
    return [
        Figure(label, rate, "images/s", None, ">=", config.command),
        Figure(f"{label}: model FLOP utilisation", use, "%", goal, ">=", config.command),
    ]


def _step_row(step: Measured, ceiling: float) -> Row:
    return {
        "trains": step.mode,
        "batch": step.batch,
        "images/s": f"{step.images_per_second:.4g}",
        "ms per step": f"{1000 * step.seconds:.4g}",
        "GFLOP per image": f"{step.flops / 1e9:.4g}",
        "utilisation": f"{step.utilisation(ceiling):.1%}",
        "peak GiB": "" if step.peak_bytes is None else f"{step.peak_bytes / (1 << 30):.1f}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and keep; exit code 2 and one line on anything the caller can put right."""
    parser = ArgumentParser(prog="python -m benchmarks.teacher_step", description=__doc__, exit_on_error=False)
    parser.add_class_arguments(TeacherStepConfig)
    try:
        values = parser.instantiate_classes(parser.parse_args(arguments))
        config = TeacherStepConfig(**vars(values))
        figures, tables = teacher_step(config)
    except (UserError, ArgumentError) as error:
        print(f"benchmarks.teacher_step: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if config.record if config.record is not None else config.device == "cuda":
        say(f"{record('gpu', figures, tables).name}: {len(figures)} figures kept")


if __name__ == "__main__":
    quieten()
    main()
