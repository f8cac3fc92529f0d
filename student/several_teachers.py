"""Several teachers of one student: how they are fused, and the network that a dry run uses in place of them."""

from student.config import DistillConfig
from student.teacher_model import TeacherModel
from teacher.config import FuseConfig
from teacher.fuse import build_unfitted, check_fusable
from vpr.artifacts.store import load_artifact
from vpr.data.catalog import Catalog

_DEFAULT_DIM = 256


def fusion(config: DistillConfig) -> FuseConfig:
    """Return the fusion of the teachers, in the student's width and next to the student."""
    return FuseConfig(
        models=config.teacher,
        catalog=config.catalog,
        output=f"{config.output.rstrip('/')}-teacher",
        embedding_dim=config.model.embedding_dim or _DEFAULT_DIM,
        images=config.dimension.images,
        steps=config.dimension.steps,
        threads=config.loader.workers,
        seed=config.seed,
    )


def load_unfitted(config: DistillConfig, catalog: Catalog) -> TeacherModel:
    """Check the teachers and load them without fitting or writing anything, for a dry run.

    The network has the right shapes. The artifact is that of the first teacher.
    """
    teachers = [load_artifact(path, "teacher") for path in config.teacher]
    check_fusable(teachers, catalog)
    model, preprocess = build_unfitted(teachers, fusion(config).embedding_dim)
    return TeacherModel(model.requires_grad_(False), teachers[0], preprocess, model.embedding_dim)
