"""``vpr teacher embed``: a catalogue's embeddings by a teacher."""

from __future__ import annotations

from pathlib import Path

from teacher.model import load_teacher
from vpr.embeddings import EmbedConfig as EmbedConfig
from vpr.embeddings import embed_with, torch_forward


def embed_catalog(config: EmbedConfig) -> Path:
    """Embed a catalogue and write it as an artifact of kind ``embeddings``."""
    model, artifact = load_teacher(config.model)
    return embed_with(config, artifact, torch_forward(model))
