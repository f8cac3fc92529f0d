"""Plan of a training, printed before it starts: stages, steps and memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from teacher.adapters import add_adapters
from teacher.config import ScheduledStage, TrainConfig
from teacher.layers import freeze_except
from teacher.losses import TrainingHead
from teacher.memory import available_memory, estimate, suggest_changes
from teacher.model import build_teacher
from teacher.tower import unread_pixels
from vpr.common.distributed import rank_and_world
from vpr.common.errors import UserError, explain_system_error
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.data.loaders import EpochSampler
from vpr.imaging.preprocess import Preprocess
from vpr.training.loop import best_precision

log = get_logger(__name__)

_LOW_LORA_RATE = 1e-5  # adapters start at zero and need far larger rates than pretrained weights


def print_plan(config: TrainConfig, tower: dict[str, Any], train: Catalog, validation: Catalog) -> None:
    """Print the plan of a training; networks are built on the meta device, which allocates no weights.

    Raises:
        UserError: A network cannot be built, a batch has more images than the training split, or the split has no
            images that a loss compares.
    """
    schedule, products = config.schedule(), np.unique(train.products)
    images = f"{len(train)} images of {len(products)} products, {schedule[0].total} epochs"
    others = len(np.unique(validation.products))
    log.info(f"teacher: {config.tower.name}, {images}, validated on {others} products")
    for number, scheduled in enumerate(schedule, start=1):
        _print_stage(config, number, scheduled, tower, train)


def _print_stage(
    config: TrainConfig, number: int, scheduled: ScheduledStage, tower: dict[str, Any], train: Catalog
) -> None:
    stage, run, world = scheduled.stage, scheduled.stage.run(config.run), rank_and_world()[1]
    counts = np.unique(train.products, return_counts=True)[1]
    stage_tower = stage.tower(config.tower)
    with _reraise_as_tower_error(f"tower.name: {config.tower.name} in stage {number}"):
        teacher, preprocess = build_teacher(stage_tower, tower, load_pretrained=False, device="meta")
    head = TrainingHead(teacher.embedding_dim, torch.from_numpy(counts), scheduled.losses).to("meta")
    freeze_except(teacher, stage.train, stage.last_blocks)
    head.requires_grad_(stage.trains_classes)
    if config.lora.rank and stage.trains_tower:
        with _reraise_as_tower_error(f"tower.name: {config.tower.name} in stage {number}"):
            add_adapters(teacher, config.lora, preprocess.size)

    loader = stage.loader(config.loader)
    batch_size = loader.batch_size
    sampler = EpochSampler(train.products, loader, 0, 0, world, train.categories)
    batches = sampler.batches
    if not batches:
        sizes = f"a batch has {batch_size * world} images, the training split {len(train)}"
        raise UserError(f"stages {number}: {sizes}. Lower --loader.batch-size or batch_size in --stages.")
    images = batch_size * world
    scheduled.losses.check_products(counts.tolist(), max(loader.images_per_product, loader.min_per_product))
    scheduled.losses.check_batch(images, loader.images_per_product, batches * images)
    steps = -(-batches // run.accumulate)
    is_half = (run.precision if run.precision != "auto" else best_precision()) != "32-true"
    with _reraise_as_tower_error(f"tower.image_size: {preprocess.size} in stage {number}"):
        shards = world if run.strategy == "fsdp" else 1
        pairs = head.pair_bytes(batch_size * world)
        memory = estimate(
            teacher, head, batch_size, preprocess.size, stage.optimizer, run.ema > 0, is_half, shards, pairs
        )
    if number == 1:
        _print_preprocess(preprocess)
    log.info(
        f"  stage {number}: {stage.train}, {stage.epochs} epochs, {stage.epochs * steps} steps of "
        f"{images * min(run.accumulate, batches)} images of {preprocess.size} pixels, "
        f"trainable: teacher {_trainable_share(teacher)}, head {_trainable_share(head)}"
    )
    if few := sampler.describe_few_steps(run.accumulate):
        log.warning(f"    {few}")
    weights = scheduled.losses.weights()
    if list(weights) != ["margin"]:
        log.info(f"    losses: {', '.join(f'{name} x {weight:g}' for name, weight in weights.items())}")
    log.info(f"    memory: {memory}")
    if unread := unread_pixels(teacher.visual):
        problem = f"the last {unread} rows and columns of an image are in no patch"
        log.warning(f"    image_size {preprocess.size}: {problem}. Set it to {preprocess.size - unread}.")
    checkpointing = stage_tower.gradient_checkpointing
    if config.lora.rank and stage.trains_tower and stage.lr_tower < _LOW_LORA_RATE:
        log.warning(f"    lr_tower {stage.lr_tower:g} hardly trains adapters. Set it to about 1e-4.")
    if changes := suggest_changes(memory, available_memory(), batch_size, checkpointing, is_half, world):
        log.warning("\n    ".join(changes))


def _print_preprocess(preprocess: Preprocess) -> None:
    """Print the statistics that come with the weights, which a wrong file or tag would change."""
    mean, std = (", ".join(f"{number:.4g}" for number in values) for values in (preprocess.mean, preprocess.std))
    log.info(f"  images: {preprocess.resize}, {preprocess.interpolation}, mean {mean}, std {std}")


@contextmanager
def _reraise_as_tower_error(prefix: str) -> Iterator[None]:
    """Turn a library's exception about an invalid network into a :class:`UserError`."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if explain_system_error(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{prefix}: the network cannot be built ({reason}). Correct the tower's settings.") from None


def _trainable_share(module: nn.Module) -> str:
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return f"{trainable / 1e6:.1f} of {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
