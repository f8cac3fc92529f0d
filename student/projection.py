"""The student's dimension, and what the teacher loses where its embeddings are projected to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from student.config import DistillConfig
from student.dimension import fit_projection, project
from student.teacher_cache import TeacherCache
from student.teacher_model import TeacherModel
from vpr.common.distributed import compute_device
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import embed, l2_normalize, score_split, torch_forward

log = get_logger(__name__)


def student_dimension(config: DistillConfig, source: TeacherModel) -> int:
    """The student's own dimension."""
    wanted, given = config.model.embedding_dim, source.dim
    if wanted in (0, given):
        return given
    if config.dimension.method == "none" and config.losses.needs_teacher:
        raise UserError(
            f"model.embedding_dim: {wanted}, the teacher's embeddings have {given}: set it to {given}, or choose "
            "dimension.method pca, cosine or projector"
        )
    if config.dimension.projects_teacher and wanted > given:
        raise UserError(
            f"model.embedding_dim: {wanted} is more than the teacher's {given}: lower it, or use the projector"
        )
    return wanted


def find_projection(
    config: DistillConfig, source: TeacherModel, signal: TeacherCache | None, training: Catalog, validation: Catalog
) -> tuple[Tensor | None, dict[str, float]]:
    """The projection to the student's dimension, and what it costs the teacher on the validation images."""
    dim = config.model.embedding_dim
    if not config.losses.needs_teacher or config.dimension.method == "none" or dim == source.dim:
        return None, {}
    forward = torch_forward(source.network.to(compute_device()))
    whole = embed(validation, source.preprocess, forward)
    recall = score_split(validation, whole).recall_at_1
    if not config.dimension.projects_teacher:
        log.info(f"dimension: the teacher stays whole (recall@1 {recall:.3f}); the student's {dim} are projected up")
        return None, {"teacher_val_recall_at_1": recall}
    if signal is not None:
        vectors = signal.draw(config.dimension.images, config.seed)
    else:
        rows = np.random.default_rng(config.seed).permutation(len(training))[: config.dimension.images]
        vectors = embed(training.take(np.sort(rows)), source.preprocess, forward)
    found = {}
    for method in dict.fromkeys(("pca", config.dimension.method)):
        projection = fit_projection(replace(config.dimension, method=method), vectors, dim, config.seed)  # type: ignore[arg-type]
        short = l2_normalize(project(torch.from_numpy(whole), projection).numpy())
        found[method] = score_split(validation, short).recall_at_1
    told = ", ".join(f"{value:.3f} by {method}" for method, value in found.items())
    log.info(f"dimension: {source.dim} to {dim}: the teacher's recall@1 {recall:.3f} becomes {told}")
    return projection, {
        "teacher_val_recall_at_1": recall,
        "projected_teacher_val_recall_at_1": found[config.dimension.method],
    }
