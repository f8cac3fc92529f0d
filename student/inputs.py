"""Inputs of a distillation. Each artifact is loaded and hashed once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from student.config import DistillConfig, StudentConfig
from student.projection import check_directions, resolve_dimensions
from student.qat import check_ranges, check_same_prefixes
from student.several_teachers import plan_fusion
from student.start import Start, load_start, resolve_model
from student.teacher_model import TeacherModel, load_teacher_model
from student.unlabelled import leave_out_scored, open_unlabelled
from teacher.fuse import fuse
from teacher.train import warn_unverified_init
from vpr.artifacts.card import Parent
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import check_output
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.duplicates import concatenate
from vpr.data.splits import find_leaks
from vpr.training.loop import training_and_validation


@dataclass(frozen=True)
class DistillInputs:
    """Loaded inputs of a distillation.

    ``training`` has the labelled images, and after :meth:`add_unlabelled` also the others. ``teacher`` is the assistant
    if there is one. ``models`` are artifacts by role: ``teacher``, and ``assistant``, ``start`` and ``ranges`` if
    configured. ``parents`` and ``unlabelled`` are entries of the card. ``model`` is the complete shape of the student,
    and ``target_dim`` the width of the targets. ``start`` has the initial weights, None for random ones.
    """

    catalog: Catalog
    training: Catalog
    validation: Catalog
    teacher: TeacherModel
    models: dict[str, Artifact]
    parents: list[Parent]
    unlabelled: dict[str, Any]
    unlabelled_images: Catalog | None
    model: StudentConfig
    target_dim: int
    start: Start | None

    def fits_head(self, config: DistillConfig) -> bool:
        """Whether the student begins with a new head that is fitted."""
        return self.start is not None and self.start.has_new_head and config.fits_head

    def learned_from(self, config: DistillConfig) -> list[Artifact]:
        """Return the models that the student learns from; with losses on labels alone, a teacher is none of them."""
        return [model for role, model in self.models.items() if role != "teacher" or config.losses.needs_teacher]

    def add_unlabelled(self, config: DistillConfig, folder: Path | None) -> DistillInputs:
        """Return inputs whose training images include the unlabelled ones that show no scored product.

        Args:
            config: Distillation.
            folder: Run folder for their cosines; None compares bytes alone, for a dry run.
        """
        if self.unlabelled_images is None:
            return self
        scored = [self.validation, self.catalog.select(split="test")]
        kept, entry = leave_out_scored(self.unlabelled_images, scored, self.teacher, config, folder)
        training = concatenate([self.training, kept])
        if config.dimension.projects_teacher and self.target_dim != self.teacher.dim:
            check_directions(self.target_dim, min(config.dimension.images, len(training)))
        return replace(self, training=training, unlabelled=entry, unlabelled_images=None)


def load_inputs(config: DistillConfig) -> DistillInputs:
    """Load and check all inputs; raise :class:`UserError` if one does not fit or would be replaced by the output."""
    check_output(config.output, "student")
    roles = [("assistant", config.assistant), ("start", config.start), *(("teacher", path) for path in config.teacher)]
    for key, path in roles:
        if path and Path(path).resolve() == Path(config.output).resolve():
            raise UserError(f"output: {config.output} is also the {key}. Choose another output.")
    catalog = load_catalog(config.catalog)
    training, validation = training_and_validation(catalog, config.catalog)
    start = load_start(config)
    model = config.model if start is None else resolve_model(config.model, start)
    models, fusion = _load_models(config, start), None
    if len(config.teacher) > 1:
        fusion, teacher = plan_fusion(config, catalog, len(training))
    else:
        teacher = load_teacher_model(models.get("assistant", models["teacher"]))
    if config.require_licence:
        for artifact in (*models.values(), *(load_artifact(path, "teacher") for path in config.teacher[1:])):
            if artifact.card.kind != "ranges":
                artifact.require_licence()
    student_dim, target_dim = resolve_dimensions(config, teacher.dim)
    unlabelled, more_parents = open_unlabelled(config.unlabelled, config.output, config.dry_run)
    if config.dimension.projects_teacher and student_dim != teacher.dim:
        images = len(training) + (0 if unlabelled is None else len(unlabelled))
        check_directions(student_dim, min(config.dimension.images, images))
    if fusion and not config.dry_run:  # last, because it takes long and writes an artifact
        models["teacher"] = load_artifact(fuse(fusion), "teacher")
        teacher = load_teacher_model(models["teacher"])
    model_parents = [artifact.as_parent(role) for role, artifact in models.items()]
    parents = [*catalog.as_parents(), *model_parents, *more_parents]
    model = replace(model, embedding_dim=student_dim)
    return DistillInputs(
        catalog, training, validation, teacher, models, parents, {}, unlabelled, model, target_dim, start
    )


def leak_metadata(inputs: DistillInputs, allow_leak: bool) -> dict[str, Any]:
    """Return leaks for the card, inherited ones too; raise :class:`UserError` unless ``allow_leak`` allows them."""
    leak = find_leaks(inputs.catalog, allow_leak)
    unverified = []
    for role, artifact in inputs.models.items():
        inherited = artifact.card.catalog or {}
        if inherited.get("leak"):
            leak[role] = inherited["leak"]
        unverified += [inherited.get("start"), warn_unverified_init(artifact, inputs.catalog).get("start")]
    start = "; ".join(dict.fromkeys(text for text in unverified if text))
    return {**({"start": start} if start else {}), **({"leak": leak} if leak else {})}


def _load_models(config: DistillConfig, start: Start | None) -> dict[str, Artifact]:
    models = {"teacher": load_artifact(config.teacher[0], "teacher")}  # of several, until they are fused
    if config.assistant:
        models["assistant"] = load_artifact(config.assistant, "student")
    if start is not None and start.artifact is not None:
        models["start"] = start.artifact
    if config.quantise.ranges:
        models["ranges"] = load_artifact(config.quantise.ranges, "ranges")
        check_ranges(models["ranges"], models["start"])
        check_same_prefixes(config.losses, models["start"])
    return models
