"""Lightning module of a student: views, targets and losses of a step."""

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from student.config import DistillConfig
from student.criterion import DistillationLoss
from student.model import Student
from student.network_stem import NetworkStem
from student.targets import Mixup, Targets
from student.tokens import TeacherTokens, TokenMaps, watch_tokens
from vpr.common.transfer import to_device
from vpr.data.catalog import Catalog
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.preprocess import Preprocess
from vpr.training.loop import RecallModule, decay_groups

_BLOCK = re.compile(r"vit\.transformer\.layers\.(\d+)\.")


class StudentModule(RecallModule):
    """Student and criterion.

    The teacher is present only through its targets, None for losses of labels only, and its tokens, None unless a loss
    compares them.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        criterion: DistillationLoss,
        targets: Targets | None,
        preprocess: Preprocess,
        validation: Catalog,
        tokens: TeacherTokens | None = None,
    ) -> None:
        super().__init__(preprocess, validation)
        self.config = config
        self.student = student
        self.criterion = criterion
        self.targets = targets
        self.tokens = tokens

    def embed(self, x: Tensor) -> Tensor:
        """Map (batch, 3, size, size) preprocessed images to (batch, dim) of unit length."""
        return self.student(x)

    def on_train_epoch_start(self) -> None:
        """Sample the bank of the epoch; set the BatchNorm layers to evaluation mode that keep their statistics."""
        stem = self.student.vit.to_patch_embedding
        if self.config.start and self.config.freeze_statistics and isinstance(stem, NetworkStem):
            for layer in stem.network.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        if self.targets is not None:
            self.targets.start_epoch(self.current_epoch, self.device)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        """Return the weighted sum of the losses of one batch of views."""
        config, epoch, rows = self.config, self.current_epoch, batch["rows"]
        self.seed_step(config.seed, epoch, number)
        view = epoch if self.targets is None else self.targets.choose_view(epoch)
        parameters = draw_views(config.views, config.view_seed, rows, torch.full_like(rows, view))
        mixup = Mixup(config.targets.mixup, len(rows)) if config.targets.mixup else None
        pixels = apply_views(batch["pixels"], parameters, self.image_size)
        x = self.normalise(pixels if mixup is None else mixup(pixels))
        teacher = bank = None
        watch: AbstractContextManager[TokenMaps | None] = nullcontext()
        if self.tokens is not None:
            watch = watch_tokens(self.student, self.tokens.tap)
        with watch as tokens:
            if self.targets is not None:
                teacher, bank = self.targets.targets_for(batch, parameters, epoch, mixup)
            if self.criterion.logits is not None:
                labels = to_device(self.criterion.labels.by_row[rows], x.device)
                losses = {"logits": self.criterion.logits(x, labels, teacher)}
            else:
                progress = self.global_step / max(1, int(self.trainer.estimated_stepping_batches))
                losses = self.criterion(self.student(x), teacher, bank, rows, progress, epoch, tokens)
        self.log_losses(losses, len(rows))
        loss = self.criterion.total(losses)
        self.check_finite(loss, number)
        return self.rescale_for_accumulation(loss, number)

    def configure_optimizers(self) -> Any:
        """Return AdamW with one warm-up and a cosine schedule."""
        config = self.config
        groups = []
        for factor, parameters in group_by_rate(self.student, self.criterion, config.layer_decay).items():
            groups += decay_groups(parameters, factor * config.lr, config.weight_decay)
        return self.with_warmup_cosine(self.build_optimizer(torch.optim.AdamW, groups), config.warmup)


def group_by_rate(student: Student, criterion: nn.Module, layer_decay: float) -> dict[float, list[nn.Parameter]]:
    """Return the parameters by the factor of their learning rate, which falls with the distance from the output.

    The head and the layers of the criterion have the factor 1, the last block ``layer_decay``, the one before it
    ``layer_decay`` squared, and stem, positions and tokens the smallest (Bao et al., "BEiT", ICLR 2022, section 3.2).
    """
    depth, groups = student.config.depth, dict[float, list[nn.Parameter]]()
    last = ("vit.mlp_head.", "vit.to_latent.", "vit.transformer.norm.", "vit.transformer.pool.")
    layers = {}
    for name, parameter in student.named_parameters():
        block = _BLOCK.match(name)
        layer = 1 + int(block[1]) if block else depth + 1 if name.startswith(last) else 0
        layers[parameter] = layer
    # Student and criterion share layers for the loss ``logits``.
    for parameter in dict.fromkeys((*layers, *criterion.parameters())):
        factor = layer_decay ** (depth + 1 - layers.get(parameter, depth + 1))
        groups.setdefault(factor, []).append(parameter)
    return groups
