"""Projection from the teacher's embedding width D to the student's width d, and its cost in recall."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from student.config import DimensionConfig, DistillConfig
from student.teacher_cache import TeacherCache
from student.teacher_model import TeacherModel
from vpr.common.distributed import compute_device
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import embed, l2_normalize, score_split, torch_forward
from vpr.retrieval.projection import Vectors, preserve_cosines, principal_directions, project

log = get_logger(__name__)


def resolve_dimensions(config: DistillConfig, teacher_dim: int) -> tuple[int, int]:
    """Return the widths of student and targets; raise :class:`UserError` if the method does not lead to them."""
    student_dim, method = config.model.embedding_dim or teacher_dim, config.dimension
    if student_dim != teacher_dim and method.method == "none" and config.losses.compares_embeddings:
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
    check_directions(dim, min(vectors.shape))
    start = principal_directions(vectors, dim)
    return start if config.method == "pca" else preserve_cosines(vectors, start, config.steps, seed)
