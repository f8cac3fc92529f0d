"""``vpr teacher embed``: embeddings of a catalogue by a teacher."""

from pathlib import Path

from teacher.model import load_teacher
from vpr.retrieval.config import EmbedConfig as EmbedConfig
from vpr.retrieval.embed import embed_with


def embed_catalog(config: EmbedConfig) -> Path:
    """Embed a catalogue and write it as an artifact of kind ``embeddings``."""
    return embed_with(config, load_teacher)
