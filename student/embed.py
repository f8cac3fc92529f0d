"""``vpr student embed``: embed a catalogue with a student."""

from pathlib import Path

from student.model import load_student
from vpr.retrieval.config import EmbedConfig as EmbedConfig
from vpr.retrieval.embed import embed_with


def embed_catalog(config: EmbedConfig) -> Path:
    """Embed a catalogue and write it as an artifact of kind ``embeddings``."""
    return embed_with(config, load_student)
