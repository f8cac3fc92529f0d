"""Inputs of a distillation. Each artifact is loaded and hashed once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student.config import DistillConfig
from student.projection import check_directions, resolve_dimensions
from student.qat import check_ranges
from student.teacher_model import TeacherModel, load_teacher_model
from student.unlabelled import add_unlabelled
from teacher.train import warn_unverified_init
from vpr.artifacts.card import Parent
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import check_output
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.splits import find_leaks
from vpr.training.loop import training_and_validation


@dataclass(frozen=True)
class DistillInputs:
    """Loaded inputs of a distillation.

    Attributes:
        catalog: Catalogue of the labelled images.
        training: Training images: the labelled ones, then the unlabelled ones.
        validation: Images that select the epoch.
        teacher: Network that gives the targets: the assistant if there is one, else the teacher.
        models: Artifacts by role: ``teacher``, and ``assistant``, ``start`` and ``ranges`` if configured.
        parents: Parents of the student's card.
        unlabelled: Entry of the unlabelled images in the card.
        student_dim: Width of the student's embeddings.
        target_dim: Width of the embeddings that the student is compared with.
    """

    catalog: Catalog
    training: Catalog
    validation: Catalog
    teacher: TeacherModel
    models: dict[str, Artifact]
    parents: list[Parent]
    unlabelled: dict[str, Any]
    student_dim: int
    target_dim: int


def load_inputs(config: DistillConfig) -> DistillInputs:
    """Load and check everything that a distillation reads.

    Raises:
        UserError: An input does not fit the configuration, or the output would replace an input.
    """
    _check_output_path(config)
    catalog = load_catalog(config.catalog)
    training, validation = training_and_validation(catalog, config.catalog)
    models = _load_models(config)
    teacher = load_teacher_model(models.get("assistant", models["teacher"]))
    student_dim, target_dim = resolve_dimensions(config, teacher.dim)
    scored = [validation, catalog.select(split="test")]
    training, unlabelled, unlabelled_parents = add_unlabelled(
        training, scored, config.unlabelled, config.output, config.dry_run
    )
    if config.dimension.projects_teacher and student_dim != teacher.dim:
        check_directions(student_dim, min(config.dimension.images, len(training)))
    model_parents = [artifact.as_parent(role) for role, artifact in models.items()]
    parents = [*catalog.as_parents(), *model_parents, *unlabelled_parents]
    return DistillInputs(catalog, training, validation, teacher, models, parents, unlabelled, student_dim, target_dim)


def leak_metadata(inputs: DistillInputs, allow_leak: bool) -> dict[str, Any]:
    """Return the leaks for the card, including those inherited from the inputs.

    Raises:
        UserError: Splits share products or images, and ``allow_leak`` is false.
    """
    leak = find_leaks(inputs.catalog, allow_leak)
    unverified = []
    for role, artifact in inputs.models.items():
        inherited = artifact.card.catalog or {}
        if inherited.get("leak"):
            leak[role] = inherited["leak"]
        unverified += [inherited.get("start"), warn_unverified_init(artifact, inputs.catalog).get("start")]
    start = "; ".join(dict.fromkeys(text for text in unverified if text))
    return {**({"start": start} if start else {}), **({"leak": leak} if leak else {})}


def _check_output_path(config: DistillConfig) -> None:
    check_output(config.output, "student")
    for key in ("teacher", "assistant", "start"):
        path = getattr(config, key)
        if path and Path(path).resolve() == Path(config.output).resolve():
            raise UserError(f"output: {config.output} is also the {key}. Choose another output.")


def _load_models(config: DistillConfig) -> dict[str, Artifact]:
    models = {"teacher": load_artifact(config.teacher, "teacher")}
    if config.assistant:
        models["assistant"] = load_artifact(config.assistant, "student")
    if config.start:
        models["start"] = load_artifact(config.start)
    if config.quantise.ranges:
        models["ranges"] = load_artifact(config.quantise.ranges, "ranges")
        check_ranges(models["ranges"], models["start"])
    return models
