"""Who gives the signal: the teacher, or an assistant that was distilled from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from student.model import load_student
from teacher.model import load_teacher
from vpr.artifacts.store import Artifact
from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess


@dataclass(frozen=True)
class TeacherModel:
    """A network whose embeddings a student learns from.

    Attributes:
        network: in evaluation mode.
        artifact: its own.
        preprocess: of its images.
        dim: of its embeddings.
    """

    network: nn.Module
    artifact: Artifact
    preprocess: Preprocess
    dim: int

    @classmethod
    def of(cls, network: nn.Module, artifact: Artifact) -> TeacherModel:
        """A loaded network; :class:`UserError` if its card lacks preprocessing or embedding."""
        card = artifact.card
        if card.preprocess is None or card.embedding is None:
            raise UserError(f"{artifact.path}: its card has no preprocessing or embedding: train it again")
        return cls(network, artifact, card.preprocess, card.embedding.dim)


def load_teacher_model(teacher: Path | str, assistant: Path | str = "") -> TeacherModel:
    """The assistant, where one is named, else the teacher."""
    model, artifact = load_student(assistant) if assistant else load_teacher(teacher)
    return TeacherModel.of(model.requires_grad_(False), artifact)
