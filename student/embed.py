"""``vpr student embed``: a catalogue's embeddings by a student."""

from __future__ import annotations

from pathlib import Path

from student.model import load_student
from vpr.embeddings import EmbedConfig as EmbedConfig
from vpr.embeddings import embed_with, torch_forward


def embed_catalog(config: EmbedConfig) -> Path:
    """Embed a catalogue and write it as an artifact of kind ``embeddings``."""
    model, artifact = load_student(config.model)
    return embed_with(config, artifact, torch_forward(model))
