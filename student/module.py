"""The student in training: views, targets and losses of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from student.config import DistillConfig
from student.criterion import DistillationLoss
from student.model import Student
from student.targets import CachedTargets, Mixup, OnlineTargets
from vpr.data.catalog import Catalog
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.decode import Preprocess
from vpr.training.loop import RecallModule, decay_groups


class StudentModule(RecallModule):
    """Student and losses; the teacher is present only through its targets.

    Args:
        config: the distillation.
        student: the network.
        objective: its losses.
        targets: what it is compared with; None for losses of labels alone.
        preprocess: the student's.
        validation: what is scored.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        objective: DistillationLoss,
        targets: CachedTargets | OnlineTargets | None,
        preprocess: Preprocess,
        validation: Catalog,
    ) -> None:
        super().__init__(preprocess, validation)
        self.config = config
        self.student = student
        self.objective = objective
        self.targets = targets

    def embed(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) preprocessed to (batch, dim) of unit length."""
        return self.student(x)

    def on_train_epoch_start(self) -> None:
        """Draw this epoch's bank."""
        if self.targets is not None:
            self.targets.start_epoch(self.current_epoch, self.device)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        """Weighted sum of the losses of one batch of views."""
        config, epoch, rows = self.config, self.current_epoch, batch["rows"]
        self.seed_step(config.seed, epoch, number)
        view = epoch if self.targets is None else self.targets.view(epoch)
        parameters = draw_views(config.views, config.seed, rows.cpu(), torch.full_like(rows.cpu(), view))
        mix = Mixup(config.targets.mixup, len(rows)) if config.targets.mixup else None
        pixels = apply_views(batch["pixels"], parameters)
        x = self.normalise(pixels if mix is None else mix(pixels))
        teacher = bank = None
        if self.targets is not None:
            teacher, bank = self.targets.of(batch, parameters, epoch, mix)
        if self.objective.logits is not None:
            assert teacher is not None
            labels = self.objective.labels.of_rows[rows.cpu()].to(x.device)
            losses = {"logits": self.objective.logits(x, labels, teacher)}
        else:
            progress = self.global_step / max(1, int(self.trainer.estimated_stepping_batches))
            losses = self.objective(self.student(x), teacher, bank, rows, progress, epoch)
        spread = self.trainer.world_size > 1
        self.log_dict(losses, on_step=True, on_epoch=True, batch_size=len(rows), sync_dist=spread)
        return self.of_step(self.objective.total(losses), number)

    def configure_optimizers(self) -> Any:
        """AdamW with one warm-up and cosine."""
        config = self.config
        learning = list({id(p): p for p in (*self.student.parameters(), *self.objective.parameters())}.values())
        optimizer = torch.optim.AdamW(decay_groups(learning, config.lr, config.weight_decay))
        return self.scheduled(optimizer, config.warmup)
