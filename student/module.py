"""Lightning module of a student: views, targets and losses of a step."""

from typing import Any

import torch
from torch import Tensor

from student.config import DistillConfig
from student.criterion import DistillationLoss
from student.model import Student
from student.targets import Mixup, Targets
from vpr.data.catalog import Catalog
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.preprocess import Preprocess
from vpr.training.loop import RecallModule, decay_groups


class StudentModule(RecallModule):
    """Student and criterion. The teacher is present only through its targets, None for losses of labels only."""

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        criterion: DistillationLoss,
        targets: Targets | None,
        preprocess: Preprocess,
        validation: Catalog,
    ) -> None:
        super().__init__(preprocess, validation)
        self.config = config
        self.student = student
        self.criterion = criterion
        self.targets = targets

    def embed(self, x: Tensor) -> Tensor:
        """Map (batch, 3, size, size) preprocessed images to (batch, dim) of unit length."""
        return self.student(x)

    def on_train_epoch_start(self) -> None:
        """Sample the bank of the epoch."""
        if self.targets is not None:
            self.targets.start_epoch(self.current_epoch, self.device)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        """Return the weighted sum of the losses of one batch of views."""
        config, epoch, rows = self.config, self.current_epoch, batch["rows"]
        self.seed_step(config.seed, epoch, number)
        view = epoch if self.targets is None else self.targets.choose_view(epoch)
        parameters = draw_views(config.views, config.seed, rows.cpu(), torch.full_like(rows.cpu(), view))
        mixup = Mixup(config.targets.mixup, len(rows)) if config.targets.mixup else None
        pixels = apply_views(batch["pixels"], parameters)
        x = self.normalise(pixels if mixup is None else mixup(pixels))
        teacher = bank = None
        if self.targets is not None:
            teacher, bank = self.targets.targets_for(batch, parameters, epoch, mixup)
        if self.criterion.logits is not None:
            labels = self.criterion.labels.by_row[rows.cpu()].to(x.device)
            losses = {"logits": self.criterion.logits(x, labels, teacher)}
        else:
            progress = self.global_step / max(1, int(self.trainer.estimated_stepping_batches))
            losses = self.criterion(self.student(x), teacher, bank, rows, progress, epoch)
        is_distributed = self.trainer.world_size > 1
        self.log_dict(losses, on_step=True, on_epoch=True, batch_size=len(rows), sync_dist=is_distributed)
        loss = self.criterion.total(losses)
        self.check_finite(loss, number)
        return self.rescale_for_accumulation(loss, number)

    def configure_optimizers(self) -> Any:
        """Return AdamW with one warm-up and a cosine schedule."""
        config = self.config
        # Student and criterion share layers for the loss ``logits``.
        parameters = list({id(p): p for p in (*self.student.parameters(), *self.criterion.parameters())}.values())
        optimizer = torch.optim.AdamW(decay_groups(parameters, config.lr, config.weight_decay))
        return self.with_warmup_cosine(optimizer, config.warmup)
