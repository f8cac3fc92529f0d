"""What a training will do, told before it starts: stages, steps, and the memory they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from teacher.config import HeadConfig, ScheduledStage, TowerConfig
from teacher.head import MarginHead
from teacher.layers import freeze_except
from teacher.memory import advice, available_memory, estimate
from teacher.model import build_teacher
from vpr.common.distributed import rank_and_world
from vpr.common.errors import UserError, explain_system_error
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import EpochSampler
from vpr.training.config import RunConfig
from vpr.training.loop import best_precision

log = get_logger(__name__)


def print_plan(
    places: list[ScheduledStage],
    tower: TowerConfig,
    tower_json: dict[str, Any],
    head: HeadConfig,
    train: Catalog,
    validation: Catalog,
    loader: LoaderConfig,
    run: RunConfig,
) -> None:
    """Print the plan; networks are built on the meta device, so nothing of their size is allocated."""
    products, counts = np.unique(train.products, return_counts=True)
    world = rank_and_world()[1]
    log.info(
        f"teacher: {tower.name}, {len(train)} images of {len(products)} products, {places[0].total} epochs, "
        f"validated on {len(set(validation.products.tolist()))} other products"
    )
    half = (run.precision if run.precision != "auto" else best_precision()) != "32-true"
    for number, place in enumerate(places, start=1):
        stage = place.stage
        changed = stage.tower(tower)
        with _building(f"tower.name: {tower.name} in stage {number}"):
            teacher, preprocess = build_teacher(changed, tower_json, load_pretrained=False, device="meta")
        classes = MarginHead(teacher.embedding_dim, torch.from_numpy(counts), head).to("meta")
        freeze_except(teacher, stage.train, stage.last_blocks)
        classes.requires_grad_(stage.train != "tower")
        batch = stage.batch_size or loader.batch_size
        batches = EpochSampler(train.products, replace(loader, batch_size=batch), 0, 0, world).batches
        if not batches:
            raise UserError(
                f"stages {number}: {batch * world} images in a batch, the training has {len(train)}: "
                "lower loader.batch_size or the stage's batch_size"
            )
        steps = -(-batches // run.accumulate)
        spread = world if run.strategy == "fsdp" else 1
        with _building(f"tower.image_size: {preprocess.size} in stage {number}"):
            memory = estimate(teacher, classes, batch, preprocess.size, stage.optimizer, run.ema > 0, half, spread)
        log.info(
            f"  stage {number}: {stage.train}, {stage.epochs} epochs, {stage.epochs * steps} steps of "
            f"{batch * world * run.accumulate} images of {preprocess.size} pixels; {_learning(teacher)} "
            f"parameters learn, and {_learning(classes)} of the head"
        )
        log.info(f"    memory: {memory}")
        for line in advice(memory, available_memory(), batch, changed.gradient_checkpointing, half, world):
            log.info(f"    {line}")


@contextmanager
def _building(what: str) -> Iterator[None]:
    """Turn what a library says of a configuration that no network can be made of into one line."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if explain_system_error(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{what}: cannot be built ({reason}): mend the configuration of the tower") from None


def _learning(module: nn.Module) -> str:
    learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return f"{learning / 1e6:.1f} of {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
