"""Untrained student, for measurements that do not depend on its weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from student.config import StudentConfig
from student.model import Student
from vpr.artifacts.card import Embedding
from vpr.artifacts.writer import write_artifact
from vpr.data.seen import record_seen
from vpr.imaging.preprocess import Preprocess


def write_random_student(path: Path, config: StudentConfig) -> Path:
    """Write a student artifact with random weights of a fixed seed."""
    torch.manual_seed(0)
    with write_artifact(path, "student", {"model": asdict(config)}) as draft:
        save_file(Student(config).state_dict(), draft.path / "model.safetensors")
        record_seen(draft.path, [])
        draft.preprocess = Preprocess(size=config.image_size)
        draft.embedding = Embedding(dim=config.embedding_dim, normalised=True, dtype="float32")
    return path
