from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from teacher.config import HeadConfig, ScheduledStage, StageConfig, TowerConfig
from teacher.loss_config import StageLosses
from teacher.model import build_teacher, read_tower
from teacher.module import TeacherModule
from tests.pretend_gpu import check_waits
from vpr.data.catalog import Catalog
from vpr.imaging.config import ViewConfig
from vpr.training.loop import RecallModule

VIEWS = ViewConfig(scale=(0.5, 1.6), hue=0.1, grey=0.2, cutout=0.5)


def stub_trainer(module: RecallModule) -> None:
    """Give a module what a step reads of its trainer; nothing is logged."""
    values = {"estimated_stepping_batches": 100, "global_step": 11, "current_epoch": 1, "world_size": 1}
    values |= {"accumulate_grad_batches": 1, "num_training_batches": 20}
    module._trainer = SimpleNamespace(**values)  # type: ignore[assignment]
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]


def random_batch(views: ViewConfig) -> dict[str, Tensor]:
    side = views.decoded_side(32)
    return {"rows": torch.arange(16), "pixels": torch.randint(0, 256, (16, 3, side, side), dtype=torch.uint8)}


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Let PyTorch raise an error where the host waits for a real GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def build_module(loss: Any, catalog: Catalog) -> TeacherModule:
    training = catalog.select(split="train")
    tower, preprocess = build_teacher(TowerConfig("sample-vit", "", 32), read_tower("sample-vit"), False)
    scheduled = ScheduledStage(StageConfig("all", 1), 0, 2, VIEWS, 0, StageLosses(HeadConfig(loss)))
    module = TeacherModule(scheduled, tower, preprocess, training, training)
    stub_trainer(module)
    return module


@pytest.mark.parametrize("loss", ["arcface", "cosface"])
def test_step_waits_for_the_gpu_every_tenth_time(loss: str, catalog: Catalog) -> None:
    module, batch = build_module(loss, catalog), random_batch(VIEWS)
    expected = module.training_step(dict(batch), 1)
    check_waits(module, batch, expected)


@pytest.mark.gpu
def test_step_on_a_gpu_does_not_wait(catalog: Catalog) -> None:
    module, batch = build_module("arcface", catalog).cuda(), random_batch(VIEWS)
    batch["pixels"] = batch["pixels"].cuda()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    for number in (1, 2):
        with waits_are_errors() if number == 2 else torch.enable_grad():
            module.training_step(batch, number).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
