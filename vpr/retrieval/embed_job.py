"""Embedding job: a catalogue divided into parts that any process can compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.card import Parent
from vpr.artifacts.run_folder import run_folder
from vpr.artifacts.store import Artifact
from vpr.artifacts.writer import config_to_json
from vpr.common.distributed import compute_device
from vpr.common.errors import UserError
from vpr.data.catalog import load_catalog
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.config import EmbedConfig
from vpr.retrieval.cut import check_dimensions, cut_vectors
from vpr.retrieval.embeddings import Forward, embed, torch_forward

if TYPE_CHECKING:
    from torch import nn

# Keys that do not change the vectors; a backend that does is among the model's own values.
_RUNTIME_KEYS = ("images_per_part", "threads", "ray", "backend")


@dataclass(frozen=True)
class EmbedModel:
    """A model artifact, and how this process loads it to embed."""

    artifact: Artifact  # teacher, student, graph or engine
    open: Callable[[], Forward]  # loads it on the device of this process
    values: Mapping[str, Any] = field(default_factory=dict)  # what decides the vectors beyond the configuration


Loader = Callable[[EmbedConfig], EmbedModel]


def torch_model(network: nn.Module, artifact: Artifact) -> EmbedModel:
    """Return a PyTorch network to embed with."""
    return EmbedModel(artifact, partial(_open_network, network))


def _open_network(network: nn.Module) -> Forward:
    return torch_forward(network.to(compute_device()))


class EmbedJob:
    """Parts of a catalogue, one file each.

    Raises:
        UserError: The model has no preprocessing, or fewer dimensions than are kept.
    """

    def __init__(self, config: EmbedConfig, loaded: EmbedModel) -> None:
        model = loaded.artifact
        if model.card.preprocess is None:
            raise UserError(f"{config.model}: the card has no preprocessing. Create the artifact again.")
        catalog = load_catalog(config.catalog)
        self.config, self.model = config, model
        self.preprocess: Preprocess = model.card.preprocess
        if config.dimensions:
            check_dimensions(model, config.dimensions)
        self.parents: list[Parent] = [model.as_parent("model"), *catalog.as_parents()]
        values = {key: value for key, value in config_to_json(config).items() if key not in _RUNTIME_KEYS}
        self.values = {**values, **loaded.values}
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

    def compute(self, part: int, forward: Forward) -> NDArray[np.float32]:
        """Return the embeddings of a part: (images, dim or dimensions) float32, L2-normalised."""
        rows = np.arange(part * self.part_size, min((part + 1) * self.part_size, len(self.catalog)))
        images = self.catalog.take(rows)
        vectors = embed(images, self.preprocess, forward, self.config.batch_size, self.config.threads)
        return cut_vectors(vectors, self.config.dimensions)
