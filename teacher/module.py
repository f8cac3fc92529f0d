"""Lightning module of one training stage: trainable parts, learning rates and loss."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher.adapters import Adapters, add_adapters
from teacher.config import ScheduledStage
from teacher.layers import decay_factor, freeze_except, group_by_depth
from teacher.loss_config import MiningConfig
from teacher.losses import TrainingHead
from teacher.mining import HardNegatives
from teacher.model import Teacher
from teacher.pair_loss import PairLoss
from teacher.schedule import rate_factor
from teacher.tower_config import LoraConfig
from teacher.weights import load_tower_weights
from vpr.common.distributed import rank_and_world
from vpr.common.transfer import to_device
from vpr.data.catalog import Catalog
from vpr.data.loaders import EpochSampler
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.preprocess import Preprocess
from vpr.training.loop import RecallModule, decay_groups


class TeacherModule(RecallModule):
    """Teacher, training head and losses during one stage; batches carry the row numbers of ``train``."""

    def __init__(
        self,
        scheduled: ScheduledStage,
        teacher: Teacher,
        preprocess: Preprocess,
        train: Catalog,
        validation: Catalog,
    ) -> None:
        super().__init__(preprocess, validation, sharded=("teacher", "head"))
        self.scheduled = scheduled
        self.teacher = teacher
        products, labels, counts = np.unique(train.products, return_inverse=True, return_counts=True)
        self.labels = torch.from_numpy(labels)  # on the CPU, as the rows of a batch
        self.head = TrainingHead(teacher.embedding_dim, torch.from_numpy(counts), scheduled.losses)
        self.trainable = freeze_except(teacher, scheduled.stage.train, scheduled.stage.last_blocks)
        self.head.requires_grad_(scheduled.stage.trains_classes)
        self._hard_negatives: HardNegatives | None = None
        self._adapters: Adapters | None = None

    def add_adapters(self, config: LoraConfig, size: int) -> None:
        """Train adapters in place of the tower's weights, if the rank is above 0 and the stage trains the tower.

        ``size`` is that of the images in pixels. Call this after :meth:`load_previous_stage`. The tower stays in
        evaluation mode.
        """
        stage = self.scheduled.stage
        if not config.rank or not stage.trains_tower:
            return
        self._adapters = add_adapters(self.teacher, config, size)
        added = list(self.teacher.project.modules())
        self.trainable = [*(part for part in self.trainable if part in added), *self._adapters.dropouts]

    def plain_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of the teacher or of this module with merged adapters, under the names without them."""
        if self._adapters is None:
            return state
        prefix = "visual." if any(name.startswith("visual.") for name in state) else "teacher.visual."
        return self._adapters.merge(state, prefix)

    def mine_hard_negatives(self, config: MiningConfig, sampler: Any) -> None:
        """Have the sampler put products into a batch that the embeddings of earlier epochs confuse."""
        if config.every:
            assert isinstance(sampler, EpochSampler)
            self._hard_negatives = HardNegatives(config, sampler, int(self.labels.max()) + 1)

    def embed(self, x: Tensor) -> Tensor:
        """Map preprocessed (batch, 3, size, size) to L2-normalised (batch, dim)."""
        return self.teacher(x)

    def load_previous_stage(self, state: dict[str, Tensor]) -> None:
        """Load the weights of the previous stage, resizing position embeddings to this stage's image size.

        Class directions and proxies are kept if both stages have them in the same shape.
        """
        visual = "teacher.visual."
        load_tower_weights(self.teacher.visual, {k.removeprefix(visual): v for k, v in state.items() if visual in k})
        shapes = {name: value.shape for name, value in self.head.state_dict(prefix="head.").items()}
        rest = {name: value for name, value in state.items() if visual not in name}
        kept = {n: v for n, v in rest.items() if not n.startswith("head.") or shapes.get(n) == v.shape}
        missing, unexpected = self.load_state_dict(kept, strict=False)
        assert not unexpected, unexpected
        assert all(name.startswith((visual, "head.")) for name in missing), missing

    def on_train_epoch_start(self) -> None:
        """Set frozen parts to evaluation mode, so that their BatchNorm statistics stay and dropout is off."""
        self.teacher.eval()
        for part in self.trainable:
            part.train()
        if self._hard_negatives is not None:
            self._hard_negatives.start_epoch(self.current_epoch)

    def on_train_epoch_end(self) -> None:
        """Search hard negatives for the next epochs; Lightning calls this before it writes the checkpoint."""
        if self._hard_negatives is not None:
            self._hard_negatives.end_epoch()

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """Augment a batch and return its loss."""
        scheduled, (rank, world) = self.scheduled, rank_and_world()
        epoch = scheduled.before + self.current_epoch
        self.seed_step(scheduled.seed, epoch, batch_index)
        # Views depend on the position in the epoch, not on the image: repeated images get different views.
        size = len(batch["rows"])
        positions = (batch_index * world + rank) * size + torch.arange(size)
        views = draw_views(scheduled.views, scheduled.seed, positions, torch.full_like(positions, epoch))
        embeddings = self.teacher(self.normalise(apply_views(batch["pixels"], views, self.image_size)))
        steps_per_epoch = self.trainer.estimated_stepping_batches / scheduled.stage.epochs
        progress = (scheduled.before + self.global_step / steps_per_epoch) / scheduled.total
        labels = to_device(self.labels[batch["rows"]], embeddings.device)
        if self._hard_negatives is not None:
            self._hard_negatives.add(embeddings.detach(), labels)
        losses = self.head(embeddings, labels, progress, epoch)
        loss = self.head.total(losses)
        self.log_losses({"loss": loss, **(losses if len(losses) > 1 else {})}, size)
        self.check_finite(loss, batch_index)
        return self.rescale_for_accumulation(loss, batch_index)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save memory and hard negatives, so that a resumed training run sees the same embeddings and batches."""
        for name, part in self._stateful():
            checkpoint[name] = part.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore memory and hard negatives."""
        for name, part in self._stateful():
            part.load_state_dict(checkpoint[name])

    def _stateful(self) -> list[tuple[str, PairLoss | HardNegatives]]:
        parts = (("pair_memory", self.head.pair), ("hard_negatives", self._hard_negatives))
        return [(name, part) for name, part in parts if part is not None]

    def configure_optimizers(self) -> Any:
        """Return one optimiser with the stage's schedule; learning rates depend on part and depth."""
        stage = self.scheduled.stage
        groups = self.head.parameter_groups(stage.lr_head, stage.weight_decay, stage.decay_vectors)
        layers = group_by_depth(self.teacher)
        for index, layer in enumerate(layers):
            lr = stage.lr_tower * decay_factor(index, len(layers), stage.layer_decay)
            tower = [p for name, p in layer if name.startswith("visual.")]
            added = [p for name, p in layer if not name.startswith("visual.")]
            groups += decay_groups(tower, lr, stage.weight_decay, stage.decay_vectors)
            groups += decay_groups(added, stage.lr_head, stage.weight_decay, stage.decay_vectors)
        if stage.optimizer == "sgd":
            momentum = stage.momentum
            optimizer = self.build_optimizer(torch.optim.SGD, groups, momentum=momentum, nesterov=momentum > 0)
        else:
            optimizer = self.build_optimizer(torch.optim.AdamW, groups)
        steps = int(self.trainer.estimated_stepping_batches)
        return self.with_schedule(optimizer, partial(rate_factor, stage=stage, steps=steps))
