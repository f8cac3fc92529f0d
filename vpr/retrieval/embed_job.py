"""The parts of an embedding, whichever process computes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.run_folder import run_folder
from vpr.artifacts.store import Artifact, Parent, config_to_json
from vpr.common.errors import UserError
from vpr.data.catalog import load_catalog
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.config import EmbedConfig
from vpr.retrieval.embeddings import embed, torch_forward

if TYPE_CHECKING:
    from torch import nn

Loader = Callable[[str], "tuple[nn.Module, Artifact]"]
_RUNTIME_KEYS = ("part", "threads", "ray")  # how vectors are computed, not what they are


class EmbedJob:
    """The parts of an embedding.

    Args:
        config: what to embed.
        model: artifact of the model.
    """

    def __init__(self, config: EmbedConfig, model: Artifact) -> None:
        if model.card.preprocess is None:
            raise UserError(f"{config.model}: its card has no preprocessing: make the artifact again")
        whole = load_catalog(config.catalog)
        self.config, self.model = config, model
        self.preprocess: Preprocess = model.card.preprocess
        self.parents: list[Parent] = [model.as_parent("model"), *whole.as_parents()]
        self.values: dict[str, Any] = {
            name: value for name, value in config_to_json(config).items() if name not in _RUNTIME_KEYS
        }
        self.catalog = whole.select(split=config.split or None)
        self.size = -(-config.part // config.batch_size) * config.batch_size
        self.folder = run_folder(config.output, {**self.values, "part": self.size}, self.parents)

    @cached_property
    def parts(self) -> range:
        """Numbers of the parts."""
        return range(-(-len(self.catalog) // self.size))

    def file(self, part: int) -> Path:
        """Where the vectors of a part lie once they are computed."""
        return self.folder / f"part-{part:06d}.npy"

    def compute(self, part: int, network: nn.Module) -> NDArray[np.float32]:
        """(images of the part, dim) float32, L2-normalised."""
        rows = np.arange(part * self.size, min((part + 1) * self.size, len(self.catalog)))
        images = self.catalog.take(rows)
        return embed(images, self.preprocess, torch_forward(network), self.config.batch_size, self.config.threads)
