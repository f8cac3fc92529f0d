"""``vpr teacher embed``: embeddings of a catalogue by a teacher."""

from pathlib import Path

from teacher.model import load_teacher
from vpr.retrieval.config import EmbedConfig as EmbedConfig
from vpr.retrieval.embed import embed_with
from vpr.retrieval.embed_job import EmbedModel, torch_model


def embed_catalog(config: EmbedConfig) -> Path:
    """Embed a catalogue and write it as an artifact of kind ``embeddings``."""
    return embed_with(config, load_model)


def load_model(config: EmbedConfig) -> EmbedModel:
    """Load the teacher to embed with; worker processes import this function."""
    return torch_model(*load_teacher(config.model))
