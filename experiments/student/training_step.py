"""Distillation step on a GPU: images per second with cached targets and with the teacher in the loop.

``python -m experiments.student.training_step`` measures a small student of ViT-H-14 at the largest batch that fits and
records the figures in ``docs/results/gpu.json``. ``--device cpu --teacher sample-vit --preset sample --batch 8`` runs
the same code anywhere. Weights and images are random, which does not change the time.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from experiments.command import run_command
from experiments.figures import Figure, Row
from experiments.training_step import (
    Step,
    check_step,
    count_flops,
    keep_figures,
    matmul_rate,
    matmul_shapes,
    require_gpu,
    step_command,
)
from student.config import LossConfig, Preset, StudentConfig
from student.losses import cosine_loss, interactive_contrastive, similarity_kl
from student.model import Student
from student.teacher_cache import embed_pixels
from teacher.config import TowerConfig
from teacher.model import build_teacher, read_tower
from vpr.common.log import get_logger
from vpr.data.loaders import Normalise
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.config import ViewConfig
from vpr.inference.model_size import count_multiply_adds

log = get_logger(__name__)

Mode = Literal["cached", "online"]
_BANK, _CACHED = 4096, 65536  # numbers of embeddings of the bank and of the cache


@dataclass(frozen=True)
class StudentStepConfig:
    """Measurement.

    Attributes:
        preset: Preset of the student.
        teacher: open_clip model, or JSON file or name as in ``vpr teacher train``.
        modes: ``cached`` reads the teacher's embeddings, ``online`` computes them.
        batch: Images per step; 0 finds the largest batch that fits (GPU only).
        max_batch: Largest batch to try.
        steps: Number of timed steps.
        warmup: Number of steps before the timed ones.
        device: ``cuda`` or ``cpu``.
        record: Record the figures; by default those of a GPU.
    """

    preset: Preset = "small"
    teacher: str = "ViT-H-14"
    modes: tuple[Mode, ...] = ("cached", "online")
    batch: int = 0
    max_batch: int = 8192
    steps: int = 20
    warmup: int = 5
    device: Literal["cuda", "cpu"] = "cuda"
    record: bool | None = None

    def __post_init__(self) -> None:
        check_step(self, {"batch": 0, "max_batch": 1, "steps": 1, "warmup": 0})

    @property
    def command(self) -> str:
        """Command that repeats the measurement."""
        return step_command("student.training_step", self)


class StudentStep(Step):
    """Student's training step: views, targets, student and the default losses.

    Args:
        mode: Source of the targets.
        config: Student, teacher and device.
    """

    def __init__(self, mode: Mode, config: StudentStepConfig) -> None:
        self.mode = mode
        device = config.device if mode == "online" else "meta"
        self.teacher, preprocess = build_teacher(
            TowerConfig(config.teacher, ""), read_tower(config.teacher), False, device
        )
        self.teacher.eval().requires_grad_(False)
        dim = self.teacher.embedding_dim
        self.student = Student(StudentConfig(config.preset, embedding_dim=dim)).to(config.device)
        student_preprocess = preprocess.model_copy(update={"size": self.student.config.image_size})
        self.normalise = Normalise(student_preprocess).to(config.device)
        self.normalise_teacher, self.teacher_size = Normalise(preprocess).to(config.device), preprocess.size
        rng = np.random.default_rng(0)
        self.cache = rng.standard_normal((_CACHED, dim), dtype=np.float32).astype(np.float16)
        self.bank = nn.functional.normalize(torch.randn(_BANK, dim, device=config.device), dim=1)
        super().__init__(self.student.parameters(), config.device, 1e-4, 0.05)

    def set_batch(self, batch: int) -> None:
        """See :class:`Step`."""
        self.rows = torch.arange(batch)
        sizes = {self.student.config.image_size} | ({self.teacher_size} if self.mode == "online" else set())
        self.pixels = {
            size: torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=self.device)
            for size, side in ((size, ViewConfig().decoded_side(size)) for size in sizes)
        }

    def loss(self, number: int) -> Tensor:
        """See :class:`Step`."""
        views, losses = draw_views(ViewConfig(), 0, self.rows, torch.full_like(self.rows, number)), LossConfig()
        if self.mode == "online":
            pixels = apply_views(self.pixels[self.teacher_size], views, self.teacher_size)
            teacher = embed_pixels(self.teacher, self.normalise_teacher, pixels).clone()
        else:
            cached = self.cache[(self.rows.numpy() * 7919 + number) % _CACHED].astype(np.float32)
            teacher = torch.from_numpy(cached).to(self.device, non_blocking=True)
        teacher = nn.functional.normalize(teacher, dim=1)
        with torch.autocast(self.device.type, torch.bfloat16):
            size = self.student.config.image_size
            student = self.student(self.normalise(apply_views(self.pixels[size], views, size)))
        loss = losses.cosine * cosine_loss(student, teacher)
        loss = loss + losses.similarity_kl * similarity_kl(student, teacher, self.bank, losses.temperature)
        contrast = interactive_contrastive(student, teacher, losses.contrastive_temperature)
        return loss + losses.contrastive * contrast


def student_step(config: StudentStepConfig) -> tuple[list[Figure], dict[str, list[Row]]]:
    """Measure matrix products and every mode; return figures of topic ``gpu`` and their table.

    Raises:
        UserError: There is no GPU, or the batch does not fit.
    """
    require_gpu(config.device, "--device cpu --teacher sample-vit --preset sample --batch 8")
    figures, rows = [], []
    for mode in config.modes:
        step = StudentStep(mode, config)
        peak_flops = max(matmul_rate(shape, config.device) for shape in matmul_shapes(step.student, config.device))
        flops = needed_flops(config, step)
        timed = config.steps, config.warmup, f"({mode})"
        if config.batch:
            batch, seconds = config.batch, step.seconds(config.batch, *timed)
        else:
            batch, seconds = step.time_largest(config.max_batch, *timed)
        utilisation = batch / seconds * flops / peak_flops
        rows.append(
            {
                "signal": mode,
                "batch": batch,
                "images/s": f"{batch / seconds:.4g}",
                "GFLOP per image": f"{flops / 1e9:.4g}",
                "utilisation": f"{utilisation:.1%}",
                "ceiling, TFLOP/s": f"{peak_flops / 1e12:.4g}",
            }
        )
        log.info(f"{mode}: {rows[-1]}")
        figures += _figures(config, mode, batch / seconds, 100 * utilisation)
        del step
        gc.collect()
    return figures, {"student-step": rows}


def needed_flops(config: StudentStepConfig, step: StudentStep) -> int:
    """Return the FLOPs of an image: the student's three passes, and the teacher's forward pass where it runs."""
    student_flops = 3 * 2 * count_multiply_adds(step.student, step.student.config.image_size)
    if step.mode == "cached":
        return student_flops
    shadow, preprocess = build_teacher(TowerConfig(config.teacher, ""), read_tower(config.teacher), False, "meta")
    return student_flops + count_flops(shadow.eval(), preprocess.size)


def unmeasured(config: StudentStepConfig) -> list[Figure]:
    """Return the figures of a machine without a GPU: names without values."""
    return [figure for mode in config.modes for figure in _figures(config, mode, None, None)]


def _figures(config: StudentStepConfig, mode: Mode, rate: float | None, use: float | None) -> list[Figure]:
    label = f"{config.preset} student of {config.teacher}, {mode} signal"
    return [
        Figure(label, rate, "images/s", None, ">=", config.command),
        Figure(f"{label}: model FLOP utilisation", use, "%", None, ">=", config.command),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and record the figures."""

    def work(config: StudentStepConfig) -> None:
        keep_figures(config, *student_step(config))

    run_command("experiments.student.training_step", __doc__, StudentStepConfig, work, arguments)


if __name__ == "__main__":
    main()
