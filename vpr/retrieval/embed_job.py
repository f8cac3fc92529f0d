"""Embedding job: a catalogue divided into parts that any process can compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.card import Parent
from vpr.artifacts.run_folder import run_folder
from vpr.artifacts.store import Artifact
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import UserError
from vpr.data.catalog import load_catalog
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.config import EmbedConfig
from vpr.retrieval.embeddings import embed, torch_forward

if TYPE_CHECKING:
    from torch import nn

Loader = Callable[[str], "tuple[nn.Module, Artifact]"]
_RUNTIME_KEYS = ("images_per_part", "threads", "ray")  # keys that do not change the vectors


class EmbedJob:
    """Parts of a catalogue to embed, each stored in a separate file until all are computed.

    Args:
        config: Configuration of the embedding.
        model: Model artifact.

    Raises:
        UserError: The model's card has no preprocessing.
    """

    def __init__(self, config: EmbedConfig, model: Artifact) -> None:
        if model.card.preprocess is None:
            raise UserError(f"{config.model}: the card has no preprocessing. Create the artifact again.")
        catalog = load_catalog(config.catalog)
        self.config, self.model = config, model
        self.preprocess: Preprocess = model.card.preprocess
        self.parents: list[Parent] = [model.as_parent("model"), *catalog.as_parents()]
        self.values: dict[str, Any] = {
            name: value for name, value in config_to_json(config).items() if name not in _RUNTIME_KEYS
        }
        self.catalog = catalog.select(split=config.split or None)
        # Full batches only, so that the vectors do not depend on the size of the parts.
        self.part_size = -(-config.images_per_part // config.batch_size) * config.batch_size
        self.folder = run_folder(config.output, {**self.values, "images_per_part": self.part_size}, self.parents)

    @cached_property
    def parts(self) -> range:
        """Indices of the parts."""
        return range(-(-len(self.catalog) // self.part_size))

    def file(self, part: int) -> Path:
        """Return the path of a part's vectors."""
        return self.folder / f"part-{part:06d}.npy"

    def compute(self, part: int, network: nn.Module) -> NDArray[np.float32]:
        """Return the embeddings of a part: (images, dim) float32, L2-normalised."""
        rows = np.arange(part * self.part_size, min((part + 1) * self.part_size, len(self.catalog)))
        images = self.catalog.take(rows)
        return embed(images, self.preprocess, torch_forward(network), self.config.batch_size, self.config.threads)
