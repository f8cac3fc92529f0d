"""Several teachers of one student: their checks, their fusion, and the network that a dry run uses in place of it."""

from pathlib import Path

from student.config import DistillConfig
from student.projection import check_directions
from student.teacher_model import TeacherModel
from teacher.config import FuseConfig
from teacher.fuse import build_unfitted, check_fusable
from teacher.model import is_fused
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import check_output
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.loaders import decoding_workers

_DEFAULT_DIM = 256


def plan_fusion(config: DistillConfig, catalog: Catalog, images: int) -> tuple[FuseConfig, TeacherModel]:
    """Check the teachers, and load them without fitting or writing anything.

    The network has the shapes of the fused one. Its artifact is that of the first teacher.

    Args:
        config: Distillation of several teachers.
        catalog: Catalogue of the distillation.
        images: Number of training images.

    Raises:
        UserError: The teachers cannot be fused in the student's width, or the fusion would replace another artifact.
    """
    teachers = [load_artifact(path, "teacher") for path in config.teacher]
    check_fusable(teachers, catalog)
    output = _check_fusion_output(config)
    width, dim = _widths(config, teachers)
    fusion = FuseConfig(
        models=config.teacher,
        catalog=config.catalog,
        output=str(output),
        embedding_dim=dim,
        images=config.dimension.images,
        steps=config.dimension.steps,
        threads=decoding_workers(config.loader.workers),
        seed=config.seed,
    )
    if dim < width:  # n images give n - 1 directions around their mean
        check_directions(dim, min(config.dimension.images, images) - 1)
    model, preprocess = build_unfitted(teachers, dim)
    return fusion, TeacherModel(model.requires_grad_(False), teachers[0], preprocess, model.embedding_dim)


def _check_fusion_output(config: DistillConfig) -> Path:
    """Return the folder of the fused teacher; raise :class:`UserError` if it holds anything else."""
    path = Path(f"{config.output.rstrip('/')}-teacher")
    check_output(path, "teacher")
    if (path / CARD_NAME).is_file() and not is_fused(load_artifact(path, "teacher")):
        raise UserError(f"output: the fusion would replace the teacher {path}. Choose another output.")
    return path


def _widths(config: DistillConfig, teachers: list[Artifact]) -> tuple[int, int]:
    """Return the width of all teachers together, and that of their fusion."""
    width = sum(teacher.card.embedding.dim for teacher in teachers if teacher.card.embedding)
    dim = config.model.embedding_dim or min(_DEFAULT_DIM, width)
    if dim > width:
        problem = f"the {len(teachers)} teachers have {width} dimensions together"
        raise UserError(f"model.embedding_dim: {problem}, got {dim}. Lower it.")
    return width, dim
