"""Training criterion of a student: the weighted losses and their layers that are dropped after training."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from vit_pytorch.distill import DistillableViT, DistillWrapper

from student import losses
from student.config import LossConfig
from student.loss_config import LABEL_LOSSES
from student.model import Student, build_vit
from student.tokens import TokenMaps, TokenProjection
from teacher.head import MarginHead
from vpr.common.errors import UserError
from vpr.common.transfer import to_device
from vpr.data.catalog import Catalog
from vpr.data.readers import UNLABELLED

_MAX_TRIPLE_IMAGES = 128  # The angles of their triples take 8 MiB.


class Labels:
    """Product numbers of the training rows.

    Attributes:
        by_row: (n,) int64 product number of each row, -1 for images without a label.
        counts: (products,) int64 number of images of each product.
    """

    def __init__(self, training: Catalog) -> None:
        labelled = np.array(training.table["source"].to_pylist()) != UNLABELLED
        _, numbers, counts = np.unique(training.products[labelled], return_inverse=True, return_counts=True)
        self.counts: NDArray[np.int64] = counts
        by_row = np.full(len(training), -1, dtype=np.int64)
        by_row[labelled] = numbers
        self.by_row = torch.from_numpy(by_row)


class DistillationLoss(nn.Module):
    """Named losses of a batch and their weighted sum.

    ``cosine_64`` is the loss ``cosine`` of the nested prefix of 64 dimensions.
    ``logits`` trains the student's layers inside vit-pytorch's wrapper. A learned projection leads from another student
    width to ``dim``, the width of the target embeddings, and one for tokens to ``token_width``, that of the teacher.

    Raises:
        UserError: Fewer than two products for a loss of labels, or a family that ``logits`` does not support.
    """

    def __init__(self, config: LossConfig, student: Student, labels: Labels, dim: int, token_width: int = 0) -> None:
        super().__init__()
        self.config = config
        self.labels = labels
        student_dim = student.config.embedding_dim
        needs_projector = config.compares_embeddings and student_dim != dim
        self.project = nn.Linear(student_dim, dim, bias=False) if needs_projector else None
        if config.weights().keys() & set(LABEL_LOSSES) and len(labels.counts) < 2:
            raise UserError("losses: margin and logits need at least two labelled products. Use other losses.")
        counts = torch.from_numpy(labels.counts)
        self.head = MarginHead(student_dim, counts, config.head) if config.margin else None
        self.logits = LogitDistillation(config, student, torch.zeros(len(counts), dim)) if config.logits else None
        self.tokens = TokenProjection(student.config.dim, token_width) if config.token_feature else None

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | None,
        bank: Tensor | None,
        rows: Tensor,
        progress: float,
        epoch: int,
        tokens: TokenMaps | None = None,
    ) -> dict[str, Tensor]:
        """Return the unweighted losses by name, in float32 also under autocast; all embeddings have unit length.

        Args:
            student: (batch, student dim) embeddings.
            teacher: (batch, dim) embeddings of the same views. None computes the losses of labels only.
            bank: (size, dim) teacher embeddings. Only ``similarity_kl`` needs them.
            rows: (batch,) rows of the training catalogue, on the CPU.
            progress: Completed share of the training, 0 to 1.
            epoch: Epoch from 0.
            tokens: Tokens of the step, for the losses that compare them.
        """
        with torch.autocast(student.device.type, enabled=False):
            named = {}
            for dim in (0, *self.config.prefixes):
                part = losses.cut_prefix(student, dim) if dim else student
                if self.head is not None:
                    named[_name("margin", dim)] = self._margin_loss(self.head, part, rows, progress, epoch)
                if teacher is not None:
                    of_teacher = self._teacher_losses(part, teacher, bank, dim)
                    named |= {_name(name, dim): loss for name, loss in of_teacher.items()}
            if tokens is not None:
                named |= self._token_losses(*losses.align_tokens(*tokens.latest()))
            return named

    def total(self, named: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of named losses; those of a prefix also have the weight of the prefix."""
        prefixes = {0: 1.0, **self.config.prefixes}
        weights = {
            _name(name, dim): of_prefix * weight
            for dim, of_prefix in prefixes.items()
            for name, weight in self.config.weights().items()
        }
        return torch.stack([weights[name] * value for name, value in named.items()]).sum()

    def _margin_loss(self, head: MarginHead, student: Tensor, rows: Tensor, progress: float, epoch: int) -> Tensor:
        labels = self.labels.by_row[rows]
        known = torch.nonzero(labels >= 0)[:, 0]
        if len(known):
            chosen = to_device(known, student.device)
            return head(student[chosen], to_device(labels[known], student.device), progress, epoch)
        return 0.0 * head.weight.sum()  # DDP needs the head in the graph of every step.

    def _token_losses(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return the losses of (batch, tokens, width) tokens of one grid."""
        named, config = {}, self.config
        if config.token_similarity:
            named["token_similarity"] = losses.token_similarity(student, teacher, config.token_temperature)
        if self.tokens is not None:
            named["token_feature"] = losses.token_feature(*self.tokens(student, teacher))
        return named

    def _teacher_losses(self, student: Tensor, teacher: Tensor, bank: Tensor | None, dim: int) -> dict[str, Tensor]:
        """Return the losses of all dimensions (``dim`` 0), or of a prefix.

        A prefix is compared with the prefix of the teacher's embeddings, and its similarities and distances with those
        of the teacher's full embeddings.
        """
        config, triples = self.config, slice(_MAX_TRIPLE_IMAGES)
        if self.project is not None:
            student = F.normalize(self.project(student), dim=1)

        def target(vectors: Tensor | None) -> Any:
            return losses.cut_prefix(vectors, dim) if dim and vectors is not None else vectors

        functions = {
            "cosine": lambda: losses.cosine_loss(student, target(teacher)),
            "mse": lambda: losses.mse_loss(student, target(teacher)),
            "similarity_kl": lambda: losses.similarity_kl(student, teacher, bank, config.temperature, target(bank)),  # type: ignore[arg-type]
            "affinity": lambda: losses.affinity_loss(student, teacher, config.temperature),
            "rkd_distance": lambda: losses.rkd_distance(student, teacher),
            "rkd_angle": lambda: losses.rkd_angle(student[triples], teacher[triples]),
            "contrastive": lambda: losses.interactive_contrastive(
                student, target(teacher), config.contrastive_temperature
            ),
        }
        return {name: loss() for name, loss in functions.items() if config.weights().get(name)}


def _name(loss: str, dim: int) -> str:
    """Return the name of a loss of all dimensions (``dim`` 0), or of a prefix."""
    return f"{loss}_{dim}" if dim else loss


class LogitDistillation(nn.Module):
    """vit-pytorch's ``DistillWrapper`` around the layers of the student.

    A classifier follows the embedding. Classifier and distillation token are dropped after training. The wrapper calls
    its teacher itself; here the teacher looks up the embeddings of the batch. ``classes`` are the (products, dim) mean
    teacher embeddings.

    Raises:
        UserError: The wrapper does not support the student's family.
    """

    def __init__(self, config: LossConfig, student: Student, classes: Tensor) -> None:
        super().__init__()
        if student.config.family != "vit":
            raise UserError("losses.logits: DistillWrapper supports the family 'vit' only. Set model.family to vit.")
        if student.config.pool == "map":
            raise UserError("losses.logits: DistillWrapper does not support the pooling 'map'. Set model.pool to mean.")
        vit = build_vit(DistillableViT, student.config)
        for name in ("to_patch_embedding", "pos_embedding", "cls_token", "transformer", "to_latent"):
            setattr(vit, name, getattr(student.vit, name))
        vit.mlp_head = nn.Sequential(student.vit.mlp_head, nn.Linear(student.config.embedding_dim, len(classes)))
        vit.num_classes = len(classes)
        self.teacher = ClassLogits(classes, config.head.scale)
        temperature, alpha = config.logits_temperature, config.logits_alpha
        self.wrapper = DistillWrapper(teacher=self.teacher, student=vit, temperature=temperature, alpha=alpha)

    def set_classes(self, classes: Tensor) -> None:
        """Set the (products, dim) mean teacher embeddings."""
        self.teacher.classes = F.normalize(classes, dim=1)

    def forward(self, x: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of (batch, 3, size, size) images, (batch,) products and (batch, dim) teacher embeddings."""
        self.teacher.embeddings = teacher
        return self.wrapper(x, labels)


class ClassLogits(nn.Module):
    """Teacher of the wrapper: scaled cosines to the (products, dim) mean embeddings."""

    classes: Tensor
    embeddings: Tensor

    def __init__(self, classes: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("classes", F.normalize(classes, dim=1), persistent=False)
        self.scale = scale

    def forward(self, _: Tensor) -> Tensor:
        """Return (batch, products) logits of the embeddings in ``embeddings``."""
        return self.scale * self.embeddings @ self.classes.T


def compute_class_means(vectors: NDArray[np.float32], labels: Labels) -> Tensor:
    """Return the (products, dim) float32 mean embedding of each product from (n, dim) embeddings of all rows."""
    total = torch.zeros(len(labels.counts), vectors.shape[1])
    known = labels.by_row >= 0
    total.index_add_(0, labels.by_row[known], torch.from_numpy(vectors)[known])
    return total / torch.from_numpy(labels.counts)[:, None]
