"""Latencies of PyTorch networks between CUDA events: precisions, and a compiled module for each batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments.figures import Figure, Row
from experiments.training_step import time_steps
from student.config import StudentConfig
from student.model import Student
from teacher.config import TowerConfig
from teacher.model import build_teacher, read_tower

COMMAND = "make gpu-check"
_SECONDS, _LEAST, _MOST, _WARMUP = 0.5, 5, 200, 3  # time, and numbers of timed and of earlier calls
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Skipped(Exception):
    """A part cannot run here. The message is the reason."""


@dataclass(frozen=True)
class Variant:
    """How a network computes.

    Attributes:
        precision: Type of weights and activations; ``tf32`` multiplies float32 with ten bits of mantissa.
        is_compiled: Compile it with CUDA graphs, once for each batch size: one compiled for two sizes would be dynamic.
    """

    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    is_compiled: bool = False

    @property
    def name(self) -> str:
        """Name in tables and figures."""
        return f"torch {self.precision}{', compiled' if self.is_compiled else ''}"


def torch_latencies(
    network: str, variants: Sequence[Variant], batches: Sequence[int], is_rehearsal: bool
) -> Iterator[tuple[list[Figure], dict[str, list[Row]]]]:
    """Yield median milliseconds of a forward pass, one batch size and variant at a time.

    Args:
        network: Preset of a student, or name of an open_clip tower.
        variants: Variants to time.
        batches: Batch sizes.
        is_rehearsal: Time the smallest network and batch on the CPU.
    """
    device = "cpu" if is_rehearsal else "cuda"
    label = f"{network} student" if network == "small" else network
    label += " in the rehearsal" if is_rehearsal else ""
    table = f"gpu-check-{network}{'-compiled' if any(v.is_compiled for v in variants) else ''}".lower()
    rows: list[Row] = []
    for variant in variants:
        rows.append({"model": label, "variant": variant.name, **{f"ms, batch {batch}": "" for batch in batches}})
        module, size = _build_network("sample" if is_rehearsal else network, device)
        module = module.to(_DTYPES[variant.precision])
        for batch in batches[:1] if is_rehearsal else batches:
            x = torch.randn(batch, 3, size, size, device=device, dtype=_DTYPES[variant.precision])
            milliseconds = 1000 * _median_seconds(module, x, variant, device)
            rows[-1][f"ms, batch {batch}"] = f"{milliseconds:.3f}"
            name = f"{label}, {variant.name}, batch {batch}, on the GPU"
            figure = Figure(name, milliseconds, "ms", None, "<=", COMMAND)
            yield [figure], {table: [dict(row) for row in rows]}


def _build_network(name: str, device: str) -> tuple[nn.Module, int]:
    """Return a network with random weights, and the side of its images."""
    if name in ("sample", "small"):
        student = Student(StudentConfig(name, embedding_dim=256))  # type: ignore[arg-type]
        return student.eval().to(device), student.config.image_size
    teacher, preprocess = build_teacher(TowerConfig(name, ""), read_tower(name), False, device)
    return teacher.eval(), preprocess.size


@torch.inference_mode()
def _median_seconds(module: nn.Module, x: Tensor, variant: Variant, device: str) -> float:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = variant.precision == "tf32"
    forward: Any = module
    if variant.is_compiled:
        torch.compiler.reset()
        forward = torch.compile(module, dynamic=False, mode="reduce-overhead" if device == "cuda" else None)

    def step(_: int) -> None:
        forward(x)

    first = time_steps(step, 1, _WARMUP, device)
    repeats = max(_LEAST, min(_MOST, round(_SECONDS / max(first, 1e-6))))
    return time_steps(step, repeats, 0, device)
