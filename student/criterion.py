"""What a student is trained on: weighted losses by name, and the parts that only training needs."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from vit_pytorch.distill import DistillableViT, DistillWrapper

from student.config import FROM_LABELS, LossConfig
from student.losses import (
    affinity_loss,
    cosine_loss,
    interactive_contrastive,
    mse_loss,
    rkd_angle,
    rkd_distance,
    similarity_kl,
)
from student.model import Student, build_vit
from teacher.head import MarginHead
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.readers import UNLABELLED

_TRIPLES = 128  # images of a batch whose triples are compared: their angles are 8 MiB


class Labels:
    """Products of the training rows as numbers; images without labels have -1."""

    def __init__(self, training: Catalog) -> None:
        labelled = np.array(training.table["source"].to_pylist()) != UNLABELLED
        _, numbers, counts = np.unique(training.products[labelled], return_inverse=True, return_counts=True)
        self.counts: NDArray[np.int64] = counts
        of_rows = np.full(len(training), -1, dtype=np.int64)
        of_rows[labelled] = numbers
        self.of_rows = torch.from_numpy(of_rows)


class DistillationLoss(nn.Module):
    """The losses of a batch by name, and their weighted sum.

    Args:
        config: weights.
        student: the network; ``logits`` trains its parts inside vit-pytorch's wrapper.
        labels: of the training images.
        dim: of the teacher's embeddings; another one than the student's is reached by a learned projection.
        classes: (products, dim) the products' mean teacher embeddings, for ``logits``.
    """

    def __init__(
        self, config: LossConfig, student: Student, labels: Labels, dim: int, classes: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.labels = labels
        own = student.config.embedding_dim
        self.project = nn.Linear(own, dim, bias=False) if config.needs_teacher and own != dim else None
        if config.weights().keys() & set(FROM_LABELS) and len(labels.counts) < 2:
            raise UserError("losses: margin and logits need the labels of at least two products: use other losses")
        counts = torch.from_numpy(labels.counts)
        self.head = MarginHead(own, counts, config.head) if config.margin else None
        self.logits = None
        if config.logits:
            assert classes is not None
            self.logits = LogitDistillation(config, student, classes)

    def forward(
        self, student: Tensor, teacher: Tensor | None, bank: Tensor | None, rows: Tensor, progress: float, epoch: int
    ) -> dict[str, Tensor]:
        """The unweighted losses, in float32 also under autocast.

        Args:
            student: (batch, own dim) of unit length.
            teacher: (batch, dim) of unit length, of the same views.
            bank: (size, dim) of unit length.
            rows: (batch,) of the training catalogue.
            progress: share of the training that is done.
            epoch: from 0.
        """
        config, found = self.config, {}
        with torch.autocast(student.device.type, enabled=False):
            if self.head is not None:
                labels = self.labels.of_rows[rows.cpu()].to(student.device)
                known = labels >= 0
                if known.any():
                    found["margin"] = self.head(student[known], labels[known], progress, epoch)
                else:  # the head takes part in every step, which DDP relies on
                    found["margin"] = 0.0 * self.head.weight.sum()
            if teacher is None:
                return found
            if self.project is not None:
                student = F.normalize(self.project(student), dim=1)
            first = slice(_TRIPLES)
            losses = {
                "cosine": lambda: cosine_loss(student, teacher),
                "mse": lambda: mse_loss(student, teacher),
                "similarity_kl": lambda: similarity_kl(student, teacher, _some(bank), config.temperature),
                "affinity": lambda: affinity_loss(student, teacher, config.temperature),
                "rkd_distance": lambda: rkd_distance(student, teacher),
                "rkd_angle": lambda: rkd_angle(student[first], teacher[first]),
                "contrastive": lambda: interactive_contrastive(student, teacher, config.contrastive_temperature),
            }
            return found | {name: loss() for name, loss in losses.items() if config.weights().get(name)}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Their weighted sum."""
        return torch.stack([self.config.weights()[name] * value for name, value in losses.items()]).sum()


class LogitDistillation(nn.Module):
    """vit-pytorch's ``DistillWrapper`` around the student's own parts.

    The embedding head is followed by a classifier that is thrown away with the distillation token. The
    wrapper runs its teacher itself; here that is a look-up of the batch's embeddings.

    Args:
        config: share, temperature and scale.
        student: whose parts are trained.
        classes: (products, dim) mean teacher embeddings.
    """

    def __init__(self, config: LossConfig, student: Student, classes: Tensor) -> None:
        super().__init__()
        if student.config.family != "vit":
            raise UserError("losses.logits: DistillWrapper knows the family 'vit' alone: set model.family to vit")
        vit = build_vit(DistillableViT, student.config)
        # Everything but the class is the student's own.
        for name in ("to_patch_embedding", "pos_embedding", "cls_token", "transformer"):
            setattr(vit, name, getattr(student.vit, name))
        vit.mlp_head = nn.Sequential(student.vit.mlp_head, nn.Linear(student.config.embedding_dim, len(classes)))
        vit.num_classes = len(classes)
        teacher = ClassLogits(classes, config.head.scale)
        self.teacher = teacher
        self.wrapper = DistillWrapper(
            teacher=teacher,
            student=vit,
            temperature=config.logits_temperature,
            alpha=config.logits_alpha,
        )

    def forward(self, x: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        """The wrapper's loss of (batch, 3, size, size) images, (batch,) labels and (batch, dim) embeddings."""
        self.teacher.embeddings = teacher
        return self.wrapper(x, labels)


class ClassLogits(nn.Module):
    """A teacher of logits made of cached embeddings: scaled cosines with the products' mean embeddings."""

    classes: Tensor
    embeddings: Tensor

    def __init__(self, classes: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("classes", F.normalize(classes, dim=1), persistent=False)
        self.scale = scale

    def forward(self, _: Tensor) -> Tensor:
        """(batch, products) logits of the batch whose ``embeddings`` were set."""
        return self.scale * self.embeddings @ self.classes.T


def class_means(vectors: NDArray[np.float32], labels: Labels) -> Tensor:
    """(products, dim) float32 mean of each product's embeddings, given those of all rows."""
    total = torch.zeros(len(labels.counts), vectors.shape[1])
    known = labels.of_rows >= 0
    total.index_add_(0, labels.of_rows[known], torch.from_numpy(vectors)[known])
    return total / torch.from_numpy(labels.counts)[:, None]


def _some(bank: Tensor | None) -> Tensor:
    assert bank is not None
    return bank
