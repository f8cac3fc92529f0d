"""A stage of training: which parts of the teacher learn, how fast, and from what loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from teacher.head import HeadConfig, MarginHead
from teacher.layers import decay_factor, layers, trainable
from teacher.model import LARGEST_SIDE, Teacher, TowerConfig
from teacher.weights import load_tower_weights
from vpr.common.distributed import rank_and_world
from vpr.common.errors import UserError, check_numbers
from vpr.data.catalog import Catalog
from vpr.imaging.augment import ViewConfig, apply_views, draw_views
from vpr.imaging.decode import Preprocess
from vpr.training.loop import RecallModule, decay_groups

LARGEST = {
    "lr_head": 100.0,
    "lr_tower": 100.0,
    "weight_decay": 100.0,
    "image_size": LARGEST_SIDE + 1,
    "patch_stride": LARGEST_SIDE + 1,
    "batch_size": 1 << 20,
}


@dataclass(frozen=True)
class StageConfig:
    """A stretch of epochs with its own parts, rates and picture size; its optimiser starts anew.

    Attributes:
        train: ``head`` is the class directions and what is added to the tower (projection, BatchNorm); ``tower``
            the tower alone; ``last`` the last blocks of the tower and the head; ``all`` everything.
        epochs: length.
        lr_head: peak learning rate of the head.
        lr_tower: peak learning rate of the tower's last layer.
        layer_decay: factor on the learning rate from each layer of the tower to the one before it.
        last_blocks: how many blocks ``last`` trains.
        optimizer: ``adamw``, or ``sgd`` with Nesterov momentum .9.
        weight_decay: of matrices; biases, norms and other vectors have none.
        warmup: share of the stage spent warming up.
        image_size: side of the input, pixels; 0 keeps the tower's. Position embeddings are resized.
        patch_stride: of overlapping patches, pixels; 0 keeps the tower's.
        batch_size: pictures per step and process; 0 keeps the loader's.
        views: augmentation; none keeps the training's.
    """

    train: Literal["head", "tower", "last", "all"]
    epochs: int
    lr_head: float = 3e-4
    lr_tower: float = 3e-7
    layer_decay: float = 1.0
    last_blocks: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.01
    warmup: float = 0.1
    image_size: int = 0
    patch_stride: int = 0
    batch_size: int = 0
    views: ViewConfig | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "stages.", epochs=(1, None))
        if (self.train == "last") != (self.last_blocks > 0):
            raise UserError(f"stages.last_blocks: {self.last_blocks} with train: {self.train}: they go together")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.warmup <= 1:
            raise UserError("stages: layer_decay is above 0 and at most 1, warmup a share from 0 to 1")
        for name in ("lr_head", "lr_tower", "weight_decay", "image_size", "patch_stride", "batch_size"):
            if not 0 <= getattr(self, name) < LARGEST[name]:
                largest = LARGEST[name]
                raise UserError(f"stages.{name}: {getattr(self, name)}: give 0 or more, below {largest:g}")

    def tower(self, tower: TowerConfig) -> TowerConfig:
        """The training's tower with what this stage changes of it."""
        size, stride = self.image_size or tower.image_size, self.patch_stride or tower.patch_stride
        return replace(tower, image_size=size, patch_stride=stride)


@dataclass(frozen=True)
class Place:
    """Where a stage lies in the training.

    Attributes:
        stage: what it does.
        before: epochs of the stages before it.
        total: epochs of all stages.
        views: its augmentation.
        seed: of views and dropout.
    """

    stage: StageConfig
    before: int
    total: int
    views: ViewConfig
    seed: int


class TeacherModule(RecallModule):
    """Teacher, head and loss during one stage.

    Args:
        place: the stage.
        head: kind of margin.
        teacher: the network.
        preprocess: of its pictures.
        train: pictures whose rows the batches carry.
        validation: what is scored.
    """

    labels: Tensor

    def __init__(
        self,
        place: Place,
        head: HeadConfig,
        teacher: Teacher,
        preprocess: Preprocess,
        train: Catalog,
        validation: Catalog,
    ) -> None:
        super().__init__(preprocess, validation, sharded=("teacher", "head"))
        self.place = place
        self.teacher = teacher
        products, labels, counts = np.unique(train.products, return_inverse=True, return_counts=True)
        self.register_buffer("labels", torch.from_numpy(labels), persistent=False)
        self.head = MarginHead(teacher.embedding_dim, torch.from_numpy(counts), head)
        self.learning = trainable(teacher, place.stage.train, place.stage.last_blocks)
        self.head.requires_grad_(place.stage.train != "tower")

    def embed(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) preprocessed to (batch, dim) of unit length."""
        return self.teacher(x)

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Take over the weights of the stage before, whose pictures may have had another size."""
        visual = "teacher.visual."
        load_tower_weights(self.teacher.visual, {k.removeprefix(visual): v for k, v in state.items() if visual in k})
        rest = {name: value for name, value in state.items() if visual not in name}
        missing, unexpected = self.load_state_dict(rest, strict=False)
        assert not unexpected, unexpected
        assert all(name.startswith(visual) for name in missing), missing

    def on_train_epoch_start(self) -> None:
        """Parts that do not learn keep their BatchNorm statistics and have no dropout."""
        self.teacher.eval()
        for part in self.learning:
            part.train()

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        """Loss of one batch of views."""
        place, (rank, world) = self.place, rank_and_world()
        epoch = place.before + self.current_epoch
        self.seed_step(place.seed, epoch, number)
        # By place in the epoch, not by picture: an oversampled picture comes as another view each time.
        size = len(batch["rows"])
        index = (number * world + rank) * size + torch.arange(size)
        views = draw_views(place.views, place.seed, index, torch.full_like(index, epoch))
        embeddings = self.teacher(self.normalise(apply_views(batch["pixels"], views)))
        per_epoch = self.trainer.estimated_stepping_batches / place.stage.epochs
        progress = (place.before + self.global_step / per_epoch) / place.total
        loss = self.head(embeddings, self.labels[batch["rows"]], progress, epoch)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=size, sync_dist=world > 1)
        return self.of_step(loss, number)

    def configure_optimizers(self) -> Any:
        """One optimiser with the stage's warm-up and cosine; rates differ by part and depth."""
        stage = self.place.stage
        groups = decay_groups(list(self.head.parameters()), stage.lr_head, stage.weight_decay)
        depth = layers(self.teacher)
        for index, layer in enumerate(depth):
            rate = stage.lr_tower * decay_factor(index, len(depth), stage.layer_decay)
            tower = [p for name, p in layer if name.startswith("visual.")]
            added = [p for name, p in layer if not name.startswith("visual.")]
            groups += decay_groups(tower, rate, stage.weight_decay)
            groups += decay_groups(added, stage.lr_head, stage.weight_decay)
        if stage.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        else:
            optimizer = torch.optim.AdamW(groups)
        return self.scheduled(optimizer, stage.warmup)
