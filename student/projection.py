"""Projection from the teacher's embedding width D to the student's width d, and its cost in recall.

Nested students learn rotated targets: all cosines stay, and the first dimensions are principal directions.
"""

from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from student.config import DimensionConfig, DistillConfig
from student.teacher_cache import TeacherCache
from student.teacher_model import TeacherModel
from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.distributed import compute_device
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import embed, l2_normalize, score_split, torch_forward
from vpr.retrieval.projection import Vectors, preserve_cosines, principal_directions, principal_rotation, project

log = get_logger(__name__)

PROJECTION = "projection.safetensors"


def resolve_dimensions(config: DistillConfig, teacher_dim: int) -> tuple[int, int]:
    """Return the widths of student and targets; raise :class:`UserError` if the method does not lead to them."""
    student_dim, method = config.model.embedding_dim or teacher_dim, config.dimension
    if student_dim != teacher_dim and method.method == "none" and config.losses.compares_embeddings:
        fix = f"Set it to {teacher_dim}, or set dimension.method to pca, cosine or projector"
        raise UserError(f"model.embedding_dim: {student_dim} differs from the teacher's {teacher_dim}. {fix}.")
    if config.losses.nested and config.losses.nested[-1] >= student_dim:
        problem = f"expected less than the student's {student_dim} dimensions, got {config.losses.nested[-1]}"
        raise UserError(f"losses.nested: {problem}. Lower it, or raise model.embedding_dim.")
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
    config: DistillConfig,
    teacher: TeacherModel,
    cache: TeacherCache | None,
    training: Catalog,
    validation: Catalog,
    start: Artifact | None = None,
) -> tuple[Tensor | None, dict[str, float]]:
    """Fit the projection of the teacher and measure its recall on the validation images.

    It is fitted on cached embeddings, or without a cache on embeddings of training images. Nested students and QAT keep
    the projection of a ``start`` with the same teacher, because directions depend on the images of the fit.

    Returns:
        The (D, d) projection, None if the targets are the teacher's embeddings as they are, and the card's metrics.
    """
    method, dim, rotates = config.dimension, config.model.embedding_dim, rotates_targets(config)
    reduces = method.method != "none" and dim != teacher.dim
    if not reduces and not rotates:
        return None, {}
    forward = torch_forward(teacher.network.to(compute_device()))
    full = embed(validation, teacher.preprocess, forward)
    recall = score_split(validation, full).recall_at_1
    log.info(f"dimension: {teacher.dim} to {dim}, teacher recall@1 {recall:.3f}")
    metrics = {"teacher_val_recall_at_1": recall}
    if reduces and not method.projects_teacher:
        return None, metrics
    keeps = start is not None and (rotates or bool(config.quantise.ranges))
    projection = _read_projection(start, teacher, dim) if keeps and start is not None else None
    if projection is None:
        projection = _fit(config, _collect(config, teacher, cache, training), full, validation)
    if reduces:
        metrics["projected_teacher_val_recall_at_1"] = _score_projected(full, projection, validation)
    for prefix in config.losses.prefixes if rotates else ():
        recall = _score_projected(full, projection[:, :prefix], validation)
        metrics[f"teacher_val_recall_at_1_of_{prefix}"] = recall
        log.info(f"  first {prefix:4} dimensions   teacher recall@1 {recall:.3f}")
    return projection, metrics


def rotates_targets(config: DistillConfig) -> bool:
    """Return whether prefixes of the student are compared with prefixes of the targets."""
    return bool(config.losses.prefixes) and config.losses.compares_embeddings


def _collect(config: DistillConfig, teacher: TeacherModel, cache: TeacherCache | None, training: Catalog) -> Vectors:
    """Return (n, D) embeddings of training images to fit a projection on."""
    count = config.dimension.images
    if cache is not None:
        return cache.sample(count, config.seed)
    rows = np.random.default_rng(config.seed).permutation(len(training))[:count]
    return embed(training.take(np.sort(rows)), teacher.preprocess, torch_forward(teacher.network))


def _fit(config: DistillConfig, vectors: Vectors, full: Vectors, validation: Catalog) -> Tensor:
    """Fit the projection of the configured method, and the rotation of nested targets; log recalls with PCA's."""
    method, dim = config.dimension, config.model.embedding_dim
    projection = torch.eye(vectors.shape[1])
    # PCA is the reference.
    for name in dict.fromkeys(("pca", method.method)) if dim != vectors.shape[1] else ():
        projection = fit_projection(replace(method, method=name), vectors, dim, config.seed)  # type: ignore[arg-type]
        recall = _score_projected(full, projection, validation)
        log.info(f"  projected by {name:6}  teacher recall@1 {recall:.3f}")
    if rotates_targets(config):
        projection = projection @ principal_rotation(project(torch.from_numpy(vectors), projection).numpy())
    return projection


def _score_projected(full: Vectors, projection: Tensor, validation: Catalog) -> float:
    projected = l2_normalize(project(torch.from_numpy(full), projection).numpy())
    return score_split(validation, projected).recall_at_1


def _read_projection(start: Artifact, teacher: TeacherModel, dim: int) -> Tensor | None:
    """Return the projection of a student of the same teacher, or None."""
    sources = start.parents("assistant") or start.parents("teacher")
    if PROJECTION not in start.card.files or teacher.artifact.sha256 not in [parent.sha256 for parent in sources]:
        return None
    with reraise_as_artifact_error(start):
        projection = load_file(start.file(PROJECTION))["projection"]
        if projection.shape != (teacher.dim, dim) or projection.dtype != torch.float32:
            return None
    log.info(f"  the targets keep the projection of {start.card.name}")
    return projection


def fit_projection(config: DimensionConfig, vectors: Vectors, dim: int, seed: int) -> Tensor:
    """Fit a (D, d) float32 projection on (n, D) unit vectors; raise :class:`UserError` if d is more than D or n."""
    check_directions(dim, min(vectors.shape))
    start = principal_directions(vectors, dim)
    return start if config.method == "pca" else preserve_cosines(vectors, start, config.steps, seed)
