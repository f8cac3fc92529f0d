"""A stage of training: which parts of the teacher learn, how fast, and from what loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher.config import HeadConfig, ScheduledStage
from teacher.head import MarginHead
from teacher.layers import decay_factor, freeze_except, group_by_depth
from teacher.model import Teacher
from teacher.weights import load_tower_weights
from vpr.common.distributed import rank_and_world
from vpr.data.catalog import Catalog
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.preprocess import Preprocess
from vpr.training.loop import RecallModule, decay_groups


class TeacherModule(RecallModule):
    """Teacher, head and loss during one stage.

    Args:
        place: the stage.
        head: kind of margin.
        teacher: the network.
        preprocess: of its images.
        train: images whose rows the batches carry.
        validation: what is scored.
    """

    labels: Tensor

    def __init__(
        self,
        place: ScheduledStage,
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
        self.learning = freeze_except(teacher, place.stage.train, place.stage.last_blocks)
        self.head.requires_grad_(place.stage.train != "tower")

    def embed(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) preprocessed to (batch, dim) of unit length."""
        return self.teacher(x)

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Take over the weights of the stage before, whose images may have had another size."""
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
        # By place in the epoch, not by image: an oversampled image comes as another view each time.
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
        depth = group_by_depth(self.teacher)
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
