"""Projection from the teacher's embedding width D to the student's width d, and its cost in recall."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from student.config import DimensionConfig, DistillConfig
from student.teacher_cache import TeacherCache
from student.teacher_model import TeacherModel
from vpr.common.distributed import compute_device
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import embed, l2_normalize, score_split, torch_forward

log = get_logger(__name__)

Vectors = NDArray[np.float32]
_BATCH = 1024
_LR = 1e-3


def resolve_dimensions(config: DistillConfig, teacher_dim: int) -> tuple[int, int]:
    """Return the widths of student and targets; raise :class:`UserError` if the method does not lead to them."""
    student_dim, method = config.model.embedding_dim or teacher_dim, config.dimension
    if student_dim != teacher_dim and method.method == "none" and config.losses.needs_teacher:
        fix = f"Set it to {teacher_dim}, or set dimension.method to pca, cosine or projector"
        raise UserError(f"model.embedding_dim: {student_dim} differs from the teacher's {teacher_dim}. {fix}.")
    if student_dim > teacher_dim and method.projects_teacher:
        fix = "Lower it, or set dimension.method to projector"
        raise UserError(f"model.embedding_dim: {student_dim} is more than the teacher's {teacher_dim}. {fix}.")
    return student_dim, student_dim if method.projects_teacher else teacher_dim


def check_directions(dim: int, max_dim: int) -> None:
    """Raise :class:`UserError` if the embeddings give fewer directions than the student has dimensions."""
    if dim > max_dim:
        limit = f"the embeddings give at most {max_dim} directions"
        raise UserError(f"model.embedding_dim: {limit}, got {dim}. Lower it, or raise dimension.images.")


def find_projection(
    config: DistillConfig, teacher: TeacherModel, cache: TeacherCache | None, training: Catalog, validation: Catalog
) -> tuple[Tensor | None, dict[str, float]]:
    """Fit the projection of the teacher and measure its recall on the validation images.

    It is fitted on cached embeddings, or without a cache on embeddings of training images. Returns the (D, d)
    projection, None if the targets keep the teacher's width, and the metrics of the card.
    """
    method, dim = config.dimension, config.model.embedding_dim
    if method.method == "none" or dim == teacher.dim:
        return None, {}
    forward = torch_forward(teacher.network.to(compute_device()))
    full = embed(validation, teacher.preprocess, forward)
    recall = score_split(validation, full).recall_at_1
    log.info(f"dimension: {teacher.dim} to {dim}, teacher recall@1 {recall:.3f}")
    if not method.projects_teacher:
        return None, {"teacher_val_recall_at_1": recall}
    if cache is not None:
        vectors = cache.sample(method.images, config.seed)
    else:
        rows = np.random.default_rng(config.seed).permutation(len(training))[: method.images]
        vectors = embed(training.take(np.sort(rows)), teacher.preprocess, forward)
    for name in dict.fromkeys(("pca", method.method)):  # PCA is the reference.
        projection = fit_projection(replace(method, method=name), vectors, dim, config.seed)  # type: ignore[arg-type]
        projected = l2_normalize(project(torch.from_numpy(full), projection).numpy())
        projected_recall = score_split(validation, projected).recall_at_1
        log.info(f"  projected by {name:6}  teacher recall@1 {projected_recall:.3f}")
    return projection, {"teacher_val_recall_at_1": recall, "projected_teacher_val_recall_at_1": projected_recall}


def fit_projection(config: DimensionConfig, vectors: Vectors, dim: int, seed: int) -> Tensor:
    """Fit a (D, d) float32 projection on (n, D) unit vectors; raise :class:`UserError` if d is more than D or n."""
    start = principal_directions(vectors, dim)
    return start if config.method == "pca" else preserve_cosines(vectors, start, config.steps, seed)


def project(vectors: Tensor, projection: Tensor) -> Tensor:
    """Return (n, d) float32 vectors of unit length from (n, D) vectors, in full precision also under autocast."""
    with torch.autocast(vectors.device.type, enabled=False):
        return F.normalize(vectors.float() @ projection, dim=1)


def principal_directions(vectors: Vectors, dim: int) -> Tensor:
    """Return the (D, d) directions of most energy about the origin.

    Nothing is subtracted, because cosines are taken about the origin. Of all projections to d dimensions this one
    changes the inner products least in squared error (Eckart & Young, 1936).

    Raises:
        UserError: d is more than D or n.
    """
    check_directions(dim, min(vectors.shape))
    moment = vectors.astype(np.float64).T @ vectors.astype(np.float64)
    _, directions = np.linalg.eigh(moment)
    return torch.from_numpy(directions[:, ::-1][:, :dim].astype(np.float32).copy())


def preserve_cosines(vectors: Vectors, start: Tensor, steps: int, seed: int) -> Tensor:
    """Learn the linear (D, d) projection that preserves cosines of (n, D) unit vectors best.

    min over P of the mean over pairs i, j of w_ij (cos(P^T x_i, P^T x_j) - cos(x_i, x_j))^2, by Adam from
    ``start`` on seeded batches; the learning rate falls to 0 by a cosine. Half of the weight is uniform, half is on the
    pairs that a search ranks first: w_ij = 1/2 + 1/2 softmax_j(cos(x_i, x_j) / 0.05) n.
    """
    data = torch.from_numpy(vectors)
    projection = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([projection], lr=_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    size = min(_BATCH, len(data))
    diagonal = torch.eye(size, dtype=torch.bool)
    for _ in range(steps):
        batch = data[torch.randperm(len(data), generator=generator)[:size]]
        cosines = batch @ batch.T
        weights = 0.5 + 0.5 * size * torch.softmax(cosines.masked_fill(diagonal, -torch.inf) / 0.05, dim=1)
        projected = project(batch, projection)
        loss = (weights * (projected @ projected.T - cosines).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return projection.detach()
