"""Cost of a training step: the largest batch that fits, its seconds, and the measured peak of matrix products.

:mod:`experiments.teacher.training_step` and :mod:`experiments.student.training_step` use it.
"""

from __future__ import annotations

import gc
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

from experiments.command import check_minimums
from experiments.figures import Figure, Row, record
from vpr.common.errors import UserError, is_out_of_memory
from vpr.common.flags import to_flags
from vpr.common.log import get_logger
from vpr.training.config import RunConfig
from vpr.training.loop import decay_groups

log = get_logger(__name__)

Matmul = tuple[int, int, int]


class Step(ABC):
    """Training step on random images.

    Args:
        learning: Trained parameters.
        device: ``cuda`` or ``cpu``.
        rate: Learning rate.
        decay: Weight decay.
    """

    def __init__(self, learning: Iterable[nn.Parameter], device: str, rate: float, decay: float) -> None:
        self.device, self.learning = torch.device(device), list(learning)
        groups = decay_groups(self.learning, rate, decay)
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type == "cuda")
        self.set_batch(1)

    @abstractmethod
    def set_batch(self, batch: int) -> None:
        """Draw a new batch of random images of this size."""

    @abstractmethod
    def loss(self, number: int) -> Tensor:
        """Return the loss of the batch, in the views of this step."""

    def __call__(self, number: int) -> None:
        """Train on the batch, in other views at each step."""
        self.loss(number).backward()
        nn.utils.clip_grad_norm_(self.learning, RunConfig().clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fits(self, batch: int) -> bool:
        """Return whether two steps of this batch size fit (the second one has the optimiser's state from its start)."""
        try:
            self.set_batch(batch)
            for number in range(2):
                self(number)
            fit = True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fit = False
        self.free()
        return fit

    def seconds(self, batch: int, steps: int, warmup: int, description: str) -> float:
        """Return the median seconds of a step.

        Args:
            batch: Number of images.
            steps: Number of timed steps.
            warmup: Number of steps before the timed ones.
            description: Description of the images, for the error message.

        Raises:
            UserError: The batch does not fit.
        """
        try:
            self.set_batch(batch)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            return time_steps(self, steps, warmup, self.device.type)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"batch: {batch} images {description} do not fit into memory. Choose a smaller --batch."
            ) from None

    def time_largest(self, max_batch: int, steps: int, warmup: int, description: str) -> tuple[int, float]:
        """Return the largest batch that fits, and the median seconds of its step, see :meth:`seconds`.

        Memory may be more fragmented in the timed steps than in those of the search. Then a batch an eighth smaller is
        timed.
        """
        batch = largest_batch(self.fits, max_batch)
        while True:
            try:
                return batch, self.seconds(batch, steps, warmup, description)
            except UserError:
                if batch == 1:
                    raise
            self.free()
            batch -= max(1, batch // 8)

    def free(self) -> None:
        """Free the memory of a failed step, once its error does not hold the frames any more."""
        self.optimizer.zero_grad()
        self.set_batch(1)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def check_step(config: Any, minimums: Mapping[str, int]) -> None:
    """Raise ``UserError`` for a configuration that cannot be measured.

    Args:
        config: Configuration with ``modes``, ``batch`` and ``device``.
        minimums: Minimum values of its numbers.
    """
    check_minimums(config, minimums)
    if not config.modes:
        default: Any = next(field.default for field in fields(config) if field.name == "modes")
        raise UserError(f"modes: expected at least one of {', '.join(default)}.")
    if config.device == "cpu" and not config.batch:
        raise UserError("batch: 0 fills the memory of a GPU. With --device cpu, choose a batch such as --batch 8.")


def step_command(module: str, config: Any) -> str:
    """Return the command line that repeats the measurement of a configuration."""
    changed = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    return shlex.join(["python", "-m", f"experiments.{module}", *to_flags(type(config), changed)])


def require_gpu(device: str, example: str) -> None:
    """Raise ``UserError`` for ``cuda`` on a machine without a GPU; ``example`` are flags that run anywhere."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device: PyTorch finds no GPU here. Run this on a machine with a GPU, or try the code with {example}."
        )


def keep_figures(config: Any, figures: list[Figure], tables: dict[str, list[Row]]) -> None:
    """Record figures of topic ``gpu`` if the configuration asks for it; by default those of a GPU."""
    if config.record if config.record is not None else config.device == "cuda":
        log.info(f"{record('gpu', figures, tables).name}: {len(figures)} figures recorded")


def count_flops(teacher: nn.Module, size: int) -> int:
    """Return the FLOPs of a forward pass of one image of ``size`` pixels; a multiply-add counts as two.

    Args:
        teacher: Network on the ``meta`` device, in evaluation mode: nothing is computed.
        size: Side of the image, in pixels.
    """
    # The unfused attention consists of matrix products, which the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher(torch.empty(1, 3, size, size, device="meta"))
    return int(counter.get_total_flops())


def largest_batch(fits: Callable[[int], bool], max_batch: int) -> int:
    """Return the largest batch up to ``max_batch`` that fits: double it until it does not fit, then bisect.

    The result is exact up to 63, and at most 1/32 too small above, which saves slow trials.

    Raises:
        UserError: A single image does not fit.
    """
    good, bad = 0, 1
    while bad <= max_batch and fits(bad):
        good, bad = bad, 2 * bad
    if not good:
        raise UserError("batch: not even one image fits into the GPU's memory. Choose a smaller --tower.")
    bad = min(bad, max_batch + 1)
    while bad - good > max(1, good // 32):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def time_steps(step: Callable[[int], object], steps: int, warmup: int, device: str) -> float:
    """Return the median seconds of ``step(number)``; on a GPU between events, so that its queue stays full."""
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
    """Return (m, k, n) products: squares, and many tokens times each of the tower's four largest matrices."""
    sides, tokens = ((4096, 8192, 16384), 16384) if device == "cuda" else ((256, 512), 512)
    matrices = {(p.shape[1], p.shape[0]) for p in teacher.parameters() if p.ndim == 2}
    largest = sorted(matrices, key=lambda shape: (shape[0] * shape[1], shape))[-4:]
    return [*((side, side, side) for side in sides), *((tokens, k, n) for k, n in largest)]


def matmul_rate(shape: Matmul, device: str, repeats: int = 100) -> float:
    """Return FLOP/s of a bf16 product of normal random matrices (a GPU multiplies zeros faster, at less power)."""
    m, k, n = shape
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    seconds = time_steps(lambda _: nn.functional.linear(x, weight), repeats, repeats // 10, device)
    return 2 * m * k * n / seconds
