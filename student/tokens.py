"""Tokens of student and teacher in a training step, and the layers that compare them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from student.config import DistillConfig, StudentConfig
from student.losses import common_grid
from student.model import Student
from student.teacher_model import TeacherModel
from teacher.tokens import NoGridError, TokenGrid, TokenTap, find_tap, measure_grid, tokens_to_map
from vpr.common.distributed import all_gather_cat
from vpr.common.errors import UserError

_EPS = 1e-5  # as in BatchNorm


@dataclass(frozen=True)
class TeacherTokens:
    """Place and shape of the teacher's tokens."""

    tap: TokenTap
    grid: TokenGrid

    def describe(self, model: StudentConfig) -> str:
        """Return the grids of both networks, and the one in which their tokens are compared."""
        side = _side(model)
        rows, columns = common_grid((side, side), (self.grid.rows, self.grid.columns))
        student = TokenGrid(side, side, model.dim)
        return f"the teacher's {self.grid}, the student's {student}, compared as {rows} x {columns}"


@dataclass
class TokenMaps:
    """Tokens of the forward passes of one training step, (batch, width, rows, columns) each."""

    student: list[Tensor] = field(default_factory=list)
    teacher: list[Tensor] = field(default_factory=list)

    def latest(self) -> tuple[Tensor, Tensor]:
        """Return the float32 tokens of student and teacher; autograd takes no tensors of the inference mode."""
        return self.student[-1].float(), self.teacher[-1].float().clone()


def find_teacher_tokens(config: DistillConfig, model: StudentConfig, teacher: TeacherModel) -> TeacherTokens | None:
    """Return the teacher's tokens, or None if no loss compares them; the teacher runs on one black image.

    Raises:
        UserError: Teacher or student have no grid of several tokens.
    """
    if not config.losses.tokens:
        return None
    key, network = f"losses.{config.losses.tokens[0]}", teacher.network
    fix = "Choose another teacher, or set it to 0"
    try:
        tap = tap_student(network) if isinstance(network, Student) else find_tap(network)
        grid = measure_grid(network, tap, teacher.preprocess.size)
    except NoGridError as error:
        raise UserError(f"{key}: {teacher.artifact.path} has no grid of tokens ({error}). {fix}.") from None
    if grid.rows * grid.columns < 2:
        size = teacher.preprocess.size
        raise UserError(f"{key}: {teacher.artifact.path} has one token for an image of {size} pixels. {fix}.")
    side = _side(model)
    if side < 2:
        problem = f"a student of {model.image_size} pixels with patches of {model.patch_size} has one token"
        raise UserError(f"{key}: {problem}. Raise model.image_size, or lower model.patch_size.")
    return TeacherTokens(tap, grid)


def tap_student(student: Student) -> TokenTap:
    """Return the place of a student's tokens: before the pooling, without class and register tokens."""
    side = _side(student.config)

    def to_map(tokens: Tensor) -> Tensor:
        return tokens_to_map(tokens[:, tokens.shape[1] - side * side :], side, side)

    return TokenTap(student.vit.transformer.norm, "forward", to_map)


@contextmanager
def watch_tokens(student: Student, teacher: TokenTap) -> Iterator[TokenMaps]:
    """Collect the tokens of both networks from the forward passes inside the block."""
    maps = TokenMaps()
    with tap_student(student).watch(maps.student.append), teacher.watch(maps.teacher.append):
        yield maps


class TokenProjection(nn.Module):
    """Projection of the student's tokens to the width of the teacher's, which are standardised."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(student_width, teacher_width)
        self.standardise = Standardisation(teacher_width)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Map (batch, tokens, width) of student and teacher to the tokens to compare, of the teacher's width."""
        return self.project(student), self.standardise(teacher)


class Standardisation(nn.Module):
    """Standardise each channel by the mean and the variance of all tokens so far, those of every process.

    A LayerNorm without parameters would keep what all tokens share: channels of ViTs far from 0, and the positive
    means of features after a ReLU. The cosine of two unrelated tokens is then near 1, and the loss says little. The
    teacher is frozen, so the statistics of all steps are the best estimate, and the targets settle.
    """

    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape; in training mode, the tokens count from this step on."""
        if self.training:
            self._update(tokens)
        return (tokens - self.mean) / (self.variance + _EPS).sqrt()

    @torch.no_grad()
    def _update(self, tokens: Tensor) -> None:
        """Combine the moments of the step with those of the steps before.

        Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        1979. All steps have the same number of tokens.
        """
        variance, mean = torch.var_mean(tokens.flatten(0, 1), dim=0, correction=0)
        means, variances = all_gather_cat(torch.stack([mean, variance])[None]).unbind(1)  # (processes, width)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        self.steps += 1
        change, share = mean - self.mean, 1 / self.steps
        self.mean += share * change
        self.variance += share * (variance - self.variance) + share * (1 - share) * change.square()


def _side(config: StudentConfig) -> int:
    return config.image_size // config.patch_size
