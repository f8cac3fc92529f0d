"""Network that a student learns from: the teacher, or an assistant that was distilled from it."""

from dataclasses import dataclass

from torch import nn

from student.model import load_student
from teacher.model import load_teacher
from vpr.artifacts.store import Artifact
from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess


@dataclass(frozen=True)
class TeacherModel:
    """Network of the targets in evaluation mode, with its artifact, preprocessing and embedding width."""

    network: nn.Module
    artifact: Artifact
    preprocess: Preprocess
    dim: int


def load_teacher_model(artifact: Artifact) -> TeacherModel:
    """Load a teacher or an assistant; raise :class:`UserError` if its card has no preprocessing or embedding."""
    card, load = artifact.card, load_student if artifact.card.kind == "student" else load_teacher
    network, _ = load(artifact.path, artifact)
    if card.preprocess is None or card.embedding is None:
        raise UserError(f"{artifact.path}: the card has no preprocessing or embedding. Train the model again.")
    return TeacherModel(network.requires_grad_(False), artifact, card.preprocess, card.embedding.dim)
