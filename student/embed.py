"""``vpr student embed``: embed a catalogue with a student."""

from pathlib import Path

from student.model import load_student
from vpr.retrieval.config import EmbedConfig as EmbedConfig
from vpr.retrieval.embed import embed_with
from vpr.retrieval.embed_job import EmbedModel, torch_model


def embed_catalog(config: EmbedConfig) -> Path:
    """Embed a catalogue and write it as an artifact of kind ``embeddings``."""
    return embed_with(config, load_model)


def load_model(config: EmbedConfig) -> EmbedModel:
    """Load the student to embed with; worker processes import this function."""
    return torch_model(*load_student(config.model))
