"""What a training step costs: the largest batch that fits, its seconds, and the ceiling that they are held against.

:mod:`experiments.teacher.training_step` and :mod:`experiments.student.training_step` measure theirs by it.
"""

from __future__ import annotations

import gc
import json
import shlex
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.figures import Figure, Row, record
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.training.config import RunConfig
from vpr.training.loop import decay_groups

log = get_logger(__name__)

Matmul = tuple[int, int, int]


class Step(ABC):
    """A training's step on random images, batch after batch.

    Args:
        learning: parameters.
        device: ``cuda`` or ``cpu``.
        rate: learning rate.
        decay: of the weights.
    """

    def __init__(self, learning: Iterable[nn.Parameter], device: str, rate: float, decay: float) -> None:
        self.device, self.learning = torch.device(device), list(learning)
        groups = decay_groups(self.learning, rate, decay)
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type == "cuda")
        self.set_batch(1)

    @abstractmethod
    def set_batch(self, batch: int) -> None:
        """Make other images, so many."""

    @abstractmethod
    def loss(self, number: int) -> Tensor:
        """Of the images, in the views of this step."""

    def __call__(self, number: int) -> None:
        """Train on the images, in other views each time."""
        self.loss(number).backward()
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

    def seconds(self, batch: int, steps: int, warmup: int, what: str) -> float:
        """Median seconds of a step.

        Args:
            batch: images.
            steps: that are timed.
            warmup: steps before them.
            what: the images are, for the error.

        Raises:
            UserError: the batch does not fit.
        """
        try:
            self.set_batch(batch)
            return time_steps(self, steps, warmup, self.device.type)
        except torch.OutOfMemoryError:
            raise UserError(f"batch: {batch} images {what} do not fit: give a smaller --batch") from None


def check_step(config: Any, least: Mapping[str, int]) -> None:
    """Refuse what cannot be measured.

    Args:
        config: with ``modes``, ``batch`` and ``device``.
        least: the least value of some of its numbers.
    """
    for name, value in least.items():
        if getattr(config, name) < value:
            raise UserError(f"{name}: {getattr(config, name)}: give {value} or more")
    if not config.modes:
        usual: Any = next(f.default for f in fields(config) if f.name == "modes")
        raise UserError(f"modes: none: give {', '.join(f'[{mode}]' for mode in usual)} or both")
    if config.device == "cpu" and not config.batch:
        raise UserError("batch: 0 fills the memory of a GPU: with --device cpu, give a batch such as --batch 8")


def step_command(module: str, config: Any) -> str:
    """The command line that measures a configuration again."""
    changed = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in changed.items()}
    return " ".join([f"python -m benchmarks.{module}", *(f"--{n} {shlex.quote(t)}" for n, t in texts.items())])


def require_gpu(device: str, example: str) -> None:
    """Refuse ``cuda`` where PyTorch finds none, and name flags that run anywhere."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device: cuda: PyTorch finds no GPU here: run it where there is one, or try the code with {example}"
        )


def keep_figures(config: Any, figures: list[Figure], tables: dict[str, list[Row]]) -> None:
    """Record figures of topic ``gpu``, where the configuration says so; by default those of a GPU."""
    if config.record if config.record is not None else config.device == "cuda":
        log.info(f"{record('gpu', figures, tables).name}: {len(figures)} figures kept")


def count_flops(teacher: nn.Module, size: int) -> int:
    """FLOPs of a forward pass of one image of ``size`` pixels, a multiply-add counted as two.

    Args:
        teacher: on the ``meta`` device, in evaluation mode: nothing is computed.
        size: side of the image.
    """
    # The plain attention is made of matrix products, which the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher(torch.empty(1, 3, size, size, device="meta"))
    return int(counter.get_total_flops())


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to ``most`` that fits: doubled until one does not, then halfway between.

    Up to 63 it is exact, above it is at most 1/32 too small, which saves trials that take long.

    Raises:
        UserError: a single image does not fit.
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    if not good:
        raise UserError("batch: not even one image fits into the GPU's memory: take a smaller --tower")
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
