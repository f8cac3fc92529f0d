"""Teacher's training step on a GPU: images per second and model FLOP utilisation.

``python -m experiments.teacher.training_step`` measures ViT-H-14 at the largest batch that fits and records the figures
in ``docs/results/gpu.json``. ``--device cpu --tower sample-vit --batch 8`` runs the same code anywhere.

The step equals that of training: views, normalisation, tower, margin head, gradient, clipping, AdamW, under bf16
autocast. Model FLOP utilisation follows Chowdhery et al., "PaLM", 2022, appendix B: the FLOPs that the model needs
(recomputed activations do not count), over the fastest matrix product measured here.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from experiments.command import run_command
from experiments.figures import Figure, Row
from experiments.training_step import (
    Step,
    check_step,
    count_flops,
    keep_figures,
    largest_batch,
    matmul_rate,
    matmul_shapes,
    require_gpu,
    step_command,
)
from teacher.config import HeadConfig, TowerConfig
from teacher.head import MarginHead
from teacher.layers import freeze_except
from teacher.model import build_teacher, read_tower
from vpr.common.log import get_logger
from vpr.data.loaders import Normalise
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.config import ViewConfig

log = get_logger(__name__)

Mode = Literal["head", "full", "checkpointed"]
_LABELS: dict[Mode, str] = {
    "head": "head-only step",
    "full": "full step",
    "checkpointed": "full step with gradient checkpointing",
}
_IMAGES_PER_CLASS = 15  # sets the size of the margin, not its cost


@dataclass(frozen=True)
class TeacherStepConfig:
    """Measurement.

    Attributes:
        tower: open_clip model, or JSON file or name as in ``vpr teacher train``.
        classes: Number of classes of the margin head.
        modes: ``head`` trains the class directions only, ``full`` everything, ``checkpointed`` too, with activations
            that are computed again for the gradient: at most 75 % of the operations then count.
        batch: Images per step; 0 finds the largest batch that fits (GPU only).
        max_batch: Largest batch to try.
        steps: Number of timed steps.
        warmup: Number of steps before the timed ones.
        compile: Compile the tower, after the batch is found.
        device: ``cuda`` or ``cpu``.
        record: Record the figures; by default those of a GPU.
    """

    tower: str = "ViT-H-14"
    classes: int = 10300
    modes: tuple[Mode, ...] = ("head", "full", "checkpointed")
    batch: int = 0
    max_batch: int = 4096
    steps: int = 20
    warmup: int = 5
    compile: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    record: bool | None = None

    def __post_init__(self) -> None:
        check_step(self, {"classes": 2, "batch": 0, "max_batch": 1, "steps": 1, "warmup": 0})

    @property
    def command(self) -> str:
        """Command that repeats the measurement."""
        return step_command("teacher.training_step", self)


@dataclass(frozen=True)
class Measured:
    """Cost of a training step.

    Attributes:
        mode: Trained part.
        batch: Images per step.
        seconds: Median time of a step.
        flops: FLOPs of one image, see :func:`step_flops`.
        peak_bytes: Peak memory on the GPU; None on the CPU.
    """

    mode: Mode
    batch: int
    seconds: float
    flops: int
    peak_bytes: int | None

    @property
    def images_per_second(self) -> float:
        """Training images per second."""
        return self.batch / self.seconds

    def utilisation(self, peak_flops: float) -> float:
        """Return the model FLOP utilisation, a share of ``peak_flops`` FLOP/s."""
        return self.images_per_second * self.flops / peak_flops


class TeacherStep(Step):
    """Teacher's training step.

    Args:
        mode: Trained part.
        config: Tower, classes and device.
    """

    def __init__(self, mode: Mode, config: TeacherStepConfig) -> None:
        tower = TowerConfig(config.tower, "", gradient_checkpointing=mode == "checkpointed")
        self.teacher, self.preprocess = build_teacher(tower, read_tower(config.tower), False, config.device)
        counts = torch.full((config.classes,), _IMAGES_PER_CLASS)
        self.head = MarginHead(self.teacher.embedding_dim, counts, HeadConfig()).to(config.device)
        self.normalise = Normalise(self.preprocess).to(config.device)
        self.classes = config.classes
        self.teacher.eval()
        for part in freeze_except(self.teacher, "head" if mode == "head" else "all"):
            part.train()
        parameters = [*self.teacher.parameters(), *self.head.parameters()]
        super().__init__((p for p in parameters if p.requires_grad), config.device, 1e-5, 0.01)

    def set_batch(self, batch: int) -> None:
        """See :class:`Step`."""
        size = ViewConfig().decoded_side(self.preprocess.size)
        self.rows = torch.arange(batch)
        self.pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=self.device)
        self.labels = torch.randint(0, self.classes, (batch,), device=self.device)

    def loss(self, number: int) -> Tensor:
        """See :class:`Step`."""
        views = draw_views(ViewConfig(), 0, self.rows, torch.full_like(self.rows, number))
        with torch.autocast(self.device.type, torch.bfloat16):
            embeddings = self.teacher(self.normalise(apply_views(self.pixels, views, self.preprocess.size)))
            return self.head(embeddings, self.labels, 0.0, 0)


def step_flops(tower: int, head: int, mode: Mode) -> int:
    """Return the FLOPs of a training step for one image: a forward pass, and twice that backward if trained.

    Args:
        tower: FLOPs of the tower's forward pass.
        head: FLOPs of the class directions' forward pass.
        mode: Trained part.
    """
    return 3 * head + (tower if mode == "head" else 3 * tower)


def measure(mode: Mode, config: TeacherStepConfig, tower_flops: int) -> Measured:
    """Measure one mode.

    Raises:
        UserError: The batch does not fit.
    """
    step = TeacherStep(mode, config)
    head_flops = 2 * config.classes * step.teacher.embedding_dim
    batch, gpu, timed = config.batch, config.device == "cuda", f"of {config.tower} ({mode})"
    if config.compile:
        batch = batch or largest_batch(step.fits, config.max_batch)
        step.teacher.compile(dynamic=False)
    if batch:
        seconds = step.seconds(batch, config.steps, config.warmup, timed)
    else:
        batch, seconds = step.time_largest(config.max_batch, config.steps, config.warmup, timed)
    peak = torch.cuda.max_memory_allocated() if gpu else None
    return Measured(mode, batch, seconds, step_flops(tower_flops, head_flops, mode), peak)


def teacher_step(config: TeacherStepConfig) -> tuple[list[Figure], dict[str, list[Row]]]:
    """Measure matrix products and every mode; return figures of topic ``gpu`` and their tables.

    Raises:
        UserError: There is no GPU, or the batch does not fit.
    """
    require_gpu(config.device, "--device cpu --tower sample-vit --batch 8")
    shadow, preprocess = build_teacher(TowerConfig(config.tower, ""), read_tower(config.tower), False, "meta")
    tower_flops = count_flops(shadow.eval(), preprocess.size)
    rates = {shape: matmul_rate(shape, config.device) for shape in matmul_shapes(shadow, config.device)}
    peak_flops = max(rates.values())
    log.info(
        f"{config.tower}: {tower_flops / 1e9:.1f} GFLOP forward; matrix products reach {peak_flops / 1e12:.4g} TFLOP/s"
    )
    steps = []
    for mode in config.modes:
        steps.append(measure(mode, config, tower_flops))
        gc.collect()  # frees the network before the next one is built
        log.info(f"{_LABELS[mode]}: {_step_row(steps[-1], peak_flops)}")
    suffix = "-compiled" if config.compile else ""
    products = [{"m": m, "k": k, "n": n, "TFLOP/s": f"{rate / 1e12:.4g}"} for (m, k, n), rate in rates.items()]
    tables = {
        f"teacher-step{suffix}": [_step_row(step, peak_flops) for step in steps],
        f"teacher-step-matmul{suffix}": products,
    }
    return _figures(config, steps, peak_flops), tables


def unmeasured(config: TeacherStepConfig) -> list[Figure]:
    """Return the figures of a machine without a GPU: names and goals without values."""
    return [figure for mode in config.modes for figure in _mode_figures(config, mode, None, None)]


def _figures(config: TeacherStepConfig, steps: list[Measured], peak_flops: float) -> list[Figure]:
    figures = [Figure("bf16 matrix product, the fastest", peak_flops / 1e12, "TFLOP/s", None, ">=", config.command)]
    for step in steps:
        figures += _mode_figures(config, step.mode, step.images_per_second, 100 * step.utilisation(peak_flops))
    return figures


def _mode_figures(config: TeacherStepConfig, mode: Mode, rate: float | None, use: float | None) -> list[Figure]:
    label = f"{config.tower}{', compiled' if config.compile else ''}, {_LABELS[mode]}"
    goal = 45.0 if (config.tower, mode) == ("ViT-H-14", "full") else None
    return [
        Figure(label, rate, "images/s", None, ">=", config.command),
        Figure(f"{label}: model FLOP utilisation", use, "%", goal, ">=", config.command),
    ]


def _step_row(step: Measured, peak_flops: float) -> Row:
    return {
        "trains": step.mode,
        "batch": step.batch,
        "images/s": f"{step.images_per_second:.4g}",
        "ms per step": f"{1000 * step.seconds:.4g}",
        "GFLOP per image": f"{step.flops / 1e9:.4g}",
        "utilisation": f"{step.utilisation(peak_flops):.1%}",
        "peak GiB": "" if step.peak_bytes is None else f"{step.peak_bytes / (1 << 30):.1f}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and record the figures."""

    def work(config: TeacherStepConfig) -> None:
        keep_figures(config, *teacher_step(config))

    run_command("experiments.teacher.training_step", __doc__, TeacherStepConfig, work, arguments)


if __name__ == "__main__":
    main()
