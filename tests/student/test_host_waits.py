from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from student.config import DistillConfig, LossConfig, TargetsConfig
from student.criterion import DistillationLoss, Labels
from student.model import Student
from student.module import StudentModule
from student.qat import FakeQuantLinear
from student.targets import CachedTargets, OnlineTargets
from student.tokens import TeacherTokens
from teacher.tokens import TokenGrid, TokenTap
from tests.pretend_gpu import check_waits, move, on_gpu, pretended_gpu
from tests.student.conftest import STUDENT
from tests.teacher.test_host_waits import random_batch, stub_trainer, waits_are_errors
from vpr.data.catalog import Catalog
from vpr.imaging.config import ViewConfig
from vpr.imaging.preprocess import Preprocess

DIM = 256


class Embeddings:
    """Cache of random embeddings."""

    def lookup(self, rows: NDArray[np.int64], view: int) -> NDArray[np.float32]:
        return np.random.default_rng(view).standard_normal((64, DIM), dtype=np.float32)[rows]

    def sample(self, size: int, seed: int) -> NDArray[np.float32]:
        return np.random.default_rng(seed).standard_normal((size, DIM), dtype=np.float32)


class Pooled(nn.Module):
    """Teacher whose embeddings and tokens are pooled pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.pool(x).flatten(1).repeat(1, 2)[:, :DIM], dim=1)


def build_module(mode: Any, mixup: float, catalog: Catalog, has_tokens: bool = False) -> StudentModule:
    training, preprocess = catalog.select(split="train"), Preprocess(size=32)
    settings = TargetsConfig(mode=mode, bank=32, mixup=mixup)
    losses = LossConfig() if mixup else LossConfig(margin=1.0, affinity=1.0)
    if has_tokens:
        losses = replace(losses, token_similarity=1.0, token_feature=1.0)
    config = DistillConfig(("teacher",), "catalog", "output", model=STUDENT, targets=settings, losses=losses)
    torch.manual_seed(0)
    student, teacher = Student(STUDENT), Pooled()
    criterion = DistillationLoss(losses, student, Labels(training), DIM, token_width=3)
    if mode == "cached":
        targets: Any = CachedTargets(Embeddings(), settings, None, 0)  # type: ignore[arg-type]
    else:
        targets = OnlineTargets(teacher, preprocess, settings, DIM, None)
    tap = TokenTap(teacher.pool, "forward", lambda features: features)
    tokens = TeacherTokens(tap, TokenGrid(8, 8, 3)) if has_tokens else None
    module = StudentModule(config, student, criterion, targets, preprocess, training, tokens)
    stub_trainer(module)
    return module


@pytest.mark.parametrize(
    ("mode", "mixup", "has_tokens"),
    [("cached", 0.0, False), ("online", 0.0, False), ("online", 0.5, False), ("online", 0.5, True)],
)
def test_step_waits_for_the_gpu_every_tenth_time(mode: str, mixup: float, has_tokens: bool, catalog: Catalog) -> None:
    module, batch = build_module(mode, mixup, catalog, has_tokens), random_batch(ViewConfig())
    targets: Any = module.targets
    targets.start_epoch(1, torch.device("cpu"))
    for _ in range(2):  # the bank grows with the first step
        expected = module.training_step(dict(batch), 1)
    module = build_module(mode, mixup, catalog, has_tokens)
    targets = module.targets
    targets.start_epoch(1, torch.device("cpu"))
    check_waits(module, batch, expected)


def test_quantised_layer_does_not_wait_for_the_gpu() -> None:
    torch.manual_seed(0)
    layer, x = FakeQuantLinear(nn.Linear(8, 4), 3.0), torch.randn(5, 8)
    expected = layer(x).detach()
    with pretended_gpu() as gpu:
        move(layer)
        value = layer(on_gpu(x))
        assert gpu.waits == []
    torch.testing.assert_close(value.values_on_cpu, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "has_tokens"), [("cached", False), ("online", False), ("online", True)])
def test_step_on_a_gpu_does_not_wait(mode: str, has_tokens: bool, catalog: Catalog) -> None:
    module, batch = build_module(mode, 0.0, catalog, has_tokens).cuda(), random_batch(ViewConfig())
    batch["pixels"] = batch["pixels"].cuda()
    targets: Any = module.targets
    targets.start_epoch(1, torch.device("cuda"))
    module.training_step(batch, 1).backward()
    with waits_are_errors():
        module.training_step(batch, 2).backward()
