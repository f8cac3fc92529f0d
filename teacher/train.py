"""``vpr teacher train``: catalogue -> tower -> ArcFace -> trainer -> artifact."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor

from teacher.margin import ArcFaceHead, growing_margin
from teacher.model import Teacher, TowerConfig, build_teacher, read_tower
from vpr.artifact import Embedding, find_current, plain, write_artifact
from vpr.catalog import Catalog, check_leaks, load_catalog
from vpr.console import say
from vpr.errors import UserError
from vpr.images import Preprocess
from vpr.loading import LoaderConfig, PictureDataset, training_loader, validation_loader
from vpr.training import (
    Precision,
    RecallModule,
    decay_groups,
    drop_checkpoint,
    finish_run,
    fit,
    run_folder,
    warmup_cosine,
)
from vpr.views import ViewConfig, apply_views, draw_views


@dataclass(frozen=True)
class StageConfig:
    """A stretch of epochs with its own learning rates.

    Attributes:
        train: ``head`` trains the class directions (and the added projection), ``all`` everything.
        epochs: length.
        lr_head: peak learning rate of the head.
        lr_tower: peak learning rate of the tower; unused while only the head trains.
        warmup: share of the stage spent warming up.
    """

    train: Literal["head", "all"]
    epochs: int
    lr_head: float = 3e-4
    lr_tower: float = 3e-7
    warmup: float = 0.1


@dataclass(frozen=True)
class TrainConfig:
    """A teacher's training.

    Attributes:
        catalog: catalogue artifact; its ``train`` split is trained on, ``validation`` chooses the epoch.
        output: where the teacher is written.
        tower: the image tower.
        stages: one after the other; each has its own warm-up and cosine.
        scale: ArcFace's s.
        margin_start: ArcFace's margin at the first step, radians.
        margin_end: its margin at the last step, radians.
        weight_decay: of matrices; biases and norms have none.
        views: augmentation.
        loader: batches.
        precision: ``auto`` is bf16 where the hardware multiplies it.
        validate_every: epochs between validations.
        seed: of weights, order and views.
    """

    catalog: str
    output: str
    tower: TowerConfig = TowerConfig()
    stages: tuple[StageConfig, ...] = (StageConfig("head", 1), StageConfig("all", 9))
    scale: float = 30.0
    margin_start: float = 0.3
    margin_end: float = 0.8
    weight_decay: float = 0.01
    views: ViewConfig = ViewConfig()
    loader: LoaderConfig = LoaderConfig()
    precision: Precision = "auto"
    validate_every: int = 1
    seed: int = 0


class TeacherModule(RecallModule):
    """Teacher, head and loss; which parts train and how fast follows the stages."""

    labels: Tensor

    def __init__(
        self, config: TrainConfig, teacher: Teacher, preprocess: Preprocess, train: Catalog, validation: Catalog
    ) -> None:
        super().__init__(preprocess, validation)
        self.config = config
        self.teacher = teacher
        products, labels = np.unique(train.products, return_inverse=True)
        self.register_buffer("labels", torch.from_numpy(labels), persistent=False)
        self.head = ArcFaceHead(teacher.embedding_dim, len(products), config.scale)

    def embed(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) preprocessed to (batch, dim) of unit length."""
        return self.teacher(x)

    def stage(self) -> StageConfig:
        """The stage of the current epoch."""
        epoch = self.current_epoch
        for stage in self.config.stages:
            if epoch < stage.epochs:
                return stage
            epoch -= stage.epochs
        return self.config.stages[-1]

    def on_train_epoch_start(self) -> None:
        """Freeze the tower while only the head trains: no gradients, and its batch statistics stay."""
        whole = self.stage().train == "all"
        self.teacher.visual.requires_grad_(whole)
        self.teacher.visual.train(whole)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Loss of one batch of views."""
        rows = batch["rows"].cpu()
        views = draw_views(self.config.views, self.config.seed, rows, torch.full_like(rows, self.current_epoch))
        embeddings = self.teacher(self.normalise(apply_views(batch["pixels"], views)))
        progress = self.global_step / self.trainer.estimated_stepping_batches
        margin = growing_margin(progress, self.config.margin_start, self.config.margin_end)
        loss = self.head(embeddings, self.labels[batch["rows"]], margin)
        self.log("arcface", loss, on_step=True, on_epoch=True, batch_size=len(rows))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with separate rates for tower and head, each following the stages."""
        decay = self.config.weight_decay
        tower = decay_groups(self.teacher.visual, 1.0, decay)
        head = decay_groups(self.head, 1.0, decay) + decay_groups(self.teacher.project, 1.0, decay)
        optimizer = torch.optim.AdamW(tower + head)
        per_epoch = int(self.trainer.estimated_stepping_batches) // sum(s.epochs for s in self.config.stages)
        rates = [lambda step: self._rate(step, per_epoch, "tower")] * len(tower)
        rates += [lambda step: self._rate(step, per_epoch, "head")] * len(head)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int, per_epoch: int, part: Literal["tower", "head"]) -> float:
        for stage in self.config.stages:
            steps = stage.epochs * per_epoch
            if step < steps:
                tower_peak = stage.lr_tower if stage.train == "all" else 0.0
                peak = tower_peak if part == "tower" else stage.lr_head
                return peak * warmup_cosine(step, steps, max(1, int(stage.warmup * steps)))
            step -= steps
        return 0.0


def train(config: TrainConfig) -> Path:
    """Train a teacher and write it as an artifact of kind ``teacher``."""
    catalog = load_catalog(config.catalog)
    tower = read_tower(config.tower.name)
    card_config = {**plain(config), "tower_config": tower}
    parents = [catalog.artifact.as_parent("catalog")] if catalog.artifact else []
    if find_current(config.output, "teacher", card_config, parents):
        say(f"{config.output}: up to date")
        return Path(config.output)
    training, validation = catalog.select(split="train"), catalog.select(split="validation")
    if not len(training) or not len(validation):
        raise UserError(f"{config.catalog}: needs a train and a validation split: build it with --validation 0.1")
    check_leaks(training, validation)
    check_leaks(training, catalog.select(split="test"))
    check_leaks(validation, catalog.select(split="test"))
    L.seed_everything(config.seed, verbose=False)
    teacher, preprocess = build_teacher(config.tower, tower, load_pretrained=True)
    module = TeacherModule(config, teacher, preprocess, training, validation)
    epochs = sum(stage.epochs for stage in config.stages)
    say(
        f"teacher: {config.tower.name}, {len(training)} pictures of {len(set(training.products))} products, "
        f"{epochs} epochs, validated on {len(set(validation.products))} other products"
    )
    folder = run_folder(config.output, card_config, parents)
    started = time.monotonic()
    keep = config.loader.keep_in_memory
    loaders = (
        training_loader(PictureDataset(training, preprocess, keep), config.loader, config.seed),
        validation_loader(PictureDataset(validation, preprocess, keep), config.loader),
    )
    best = fit(module, loaders, teacher, folder, epochs, config.validate_every, config.precision)
    with write_artifact(config.output, "teacher", card_config, parents) as draft:
        finish_run(folder, draft.path)
        draft.preprocess = preprocess
        draft.embedding = Embedding(dim=teacher.embedding_dim, normalised=True, dtype="float32")
        draft.catalog = catalog.summary()
        draft.metrics = {
            "val_recall_at_1": best.best,
            "best_epoch": best.epoch,
            "steps": int(module.trainer.global_step),
            "seconds": round(time.monotonic() - started, 1),
            "parameters": sum(p.numel() for p in teacher.parameters()),
        }
    drop_checkpoint(folder)
    say(f"{config.output}: teacher of epoch {best.epoch}, validation recall@1 {best.best:.3f}")
    return Path(config.output)
