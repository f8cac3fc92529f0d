"""Lightning module of one training stage: trainable parts, learning rates and loss."""

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
    """Teacher, margin head and loss during one stage; batches carry the row numbers of ``train``."""

    labels: Tensor

    def __init__(
        self,
        scheduled: ScheduledStage,
        head: HeadConfig,
        teacher: Teacher,
        preprocess: Preprocess,
        train: Catalog,
        validation: Catalog,
    ) -> None:
        super().__init__(preprocess, validation, sharded=("teacher", "head"))
        self.scheduled = scheduled
        self.teacher = teacher
        products, labels, counts = np.unique(train.products, return_inverse=True, return_counts=True)
        self.register_buffer("labels", torch.from_numpy(labels), persistent=False)
        self.head = MarginHead(teacher.embedding_dim, torch.from_numpy(counts), head)
        self.trainable = freeze_except(teacher, scheduled.stage.train, scheduled.stage.last_blocks)
        self.head.requires_grad_(scheduled.stage.train != "tower")

    def embed(self, x: Tensor) -> Tensor:
        """Map preprocessed (batch, 3, size, size) to L2-normalised (batch, dim)."""
        return self.teacher(x)

    def load_previous_stage(self, state: dict[str, Tensor]) -> None:
        """Load the weights of the previous stage, resizing position embeddings to this stage's image size."""
        visual = "teacher.visual."
        load_tower_weights(self.teacher.visual, {k.removeprefix(visual): v for k, v in state.items() if visual in k})
        rest = {name: value for name, value in state.items() if visual not in name}
        missing, unexpected = self.load_state_dict(rest, strict=False)
        assert not unexpected, unexpected
        assert all(name.startswith(visual) for name in missing), missing

    def on_train_epoch_start(self) -> None:
        """Set frozen parts to evaluation mode, so that their BatchNorm statistics stay and dropout is off."""
        self.teacher.eval()
        for part in self.trainable:
            part.train()

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """Augment a batch and return its loss."""
        scheduled, (rank, world) = self.scheduled, rank_and_world()
        epoch = scheduled.before + self.current_epoch
        self.seed_step(scheduled.seed, epoch, batch_index)
        # Views depend on the position in the epoch, not on the image: repeated images get different views.
        size = len(batch["rows"])
        positions = (batch_index * world + rank) * size + torch.arange(size)
        views = draw_views(scheduled.views, scheduled.seed, positions, torch.full_like(positions, epoch))
        embeddings = self.teacher(self.normalise(apply_views(batch["pixels"], views)))
        steps_per_epoch = self.trainer.estimated_stepping_batches / scheduled.stage.epochs
        progress = (scheduled.before + self.global_step / steps_per_epoch) / scheduled.total
        loss = self.head(embeddings, self.labels[batch["rows"]], progress, epoch)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=size, sync_dist=world > 1)
        self.check_finite(loss, batch_index)
        return self.rescale_for_accumulation(loss, batch_index)

    def configure_optimizers(self) -> Any:
        """Return one optimiser with warm-up and cosine; learning rates depend on part and depth."""
        stage = self.scheduled.stage
        groups = decay_groups(list(self.head.parameters()), stage.lr_head, stage.weight_decay)
        layers = group_by_depth(self.teacher)
        for index, layer in enumerate(layers):
            lr = stage.lr_tower * decay_factor(index, len(layers), stage.layer_decay)
            tower = [p for name, p in layer if name.startswith("visual.")]
            added = [p for name, p in layer if not name.startswith("visual.")]
            groups += decay_groups(tower, lr, stage.weight_decay)
            groups += decay_groups(added, stage.lr_head, stage.weight_decay)
        if stage.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        else:
            optimizer = torch.optim.AdamW(groups)
        return self.with_warmup_cosine(optimizer, stage.warmup)
