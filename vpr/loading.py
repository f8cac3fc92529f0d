"""How pictures reach a training loop: decoded once or by workers, in an order that the seed alone decides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from vpr.catalog import Catalog
from vpr.embeddings import read_pixels
from vpr.errors import UserError
from vpr.images import Preprocess


@dataclass(frozen=True)
class LoaderConfig:
    """How pictures reach the training loop.

    Attributes:
        batch_size: pictures per step and process.
        workers: processes that decode; 0 decodes in the training process.
        keep_in_memory: decode every picture once and keep its pixels, for sets that fit.
    """

    batch_size: int = 128
    workers: int = 0
    keep_in_memory: bool = False


class PictureDataset(Dataset[dict[str, Tensor]]):
    """Resized pictures of a catalogue, as uint8 pixels and their row.

    Args:
        catalog: n pictures.
        preprocess: gives the size.
        keep_in_memory: decode all of them now, with threads.
    """

    def __init__(self, catalog: Catalog, preprocess: Preprocess, keep_in_memory: bool = False) -> None:
        self.catalog = catalog
        self.preprocess = preprocess
        self._kept = _decode_all(catalog, preprocess) if keep_in_memory else None

    def __len__(self) -> int:
        return len(self.catalog)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch: ``rows`` (batch,) int64 and ``pixels`` (batch, 3, size, size) uint8."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        if self._kept is not None:
            return {"rows": index, "pixels": self._kept[index]}
        pixels = np.concatenate([read_pixels(self.catalog, self.preprocess, range(row, row + 1)) for row in rows])
        return {"rows": index, "pixels": torch.from_numpy(pixels)}


class EpochSampler(Sampler[int]):
    """A permutation of the rows that depends on the seed and the epoch alone."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())

    def __len__(self) -> int:
        return self.length


def training_loader(dataset: PictureDataset, config: LoaderConfig, seed: int) -> DataLoader[dict[str, Tensor]]:
    """Shuffled batches; an incomplete last one is left out."""
    if len(dataset) < config.batch_size:
        raise UserError(
            f"loader.batch_size: {config.batch_size} is more than the {len(dataset)} training pictures: lower it"
        )
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=EpochSampler(len(dataset), seed),
        num_workers=config.workers,
        collate_fn=_same,
        drop_last=True,
        persistent_workers=config.workers > 0,
    )


def validation_loader(dataset: PictureDataset, config: LoaderConfig) -> DataLoader[dict[str, Tensor]]:
    """All pictures, in order."""
    return DataLoader(dataset, batch_size=config.batch_size, num_workers=config.workers, collate_fn=_same)


class Normalise(nn.Module):
    """Pixels 0…255 to the model's input, by the card's preprocessing."""

    scale: Tensor
    offset: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        scale, offset = preprocess.scale_offset()
        self.register_buffer("scale", torch.from_numpy(scale), persistent=False)
        self.register_buffer("offset", torch.from_numpy(offset), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, size, size) uint8 or float to float32, channels last (faster convolutions)."""
        return (pixels.float() * self.scale + self.offset).contiguous(memory_format=torch.channels_last)


def _same(batch: Any) -> Any:
    return batch  # `__getitems__` has made the batch already


def _decode_all(catalog: Catalog, preprocess: Preprocess) -> Tensor:
    kept = np.empty((len(catalog), 3, preprocess.size, preprocess.size), dtype=np.uint8)

    def decode_block(start: int) -> None:
        rows = range(start, min(start + 64, len(catalog)))
        kept[rows.start : rows.stop] = read_pixels(catalog, preprocess, rows)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(decode_block, range(0, len(catalog), 64)))
    return torch.from_numpy(kept)
