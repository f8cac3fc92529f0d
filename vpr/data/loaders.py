"""How images reach a training loop: decoded once or by workers, in an order that the seed alone decides."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from vpr.common.errors import UserError
from vpr.common.hardware import available_cpus
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.pixels import read_pixels
from vpr.imaging.preprocess import Preprocess

_SILENCE = ("ignore", None, Warning, None, 0)  # what simplefilter("ignore") puts before all other filters
_PREFETCH = 4  # batches a worker has ready; decoding is uneven


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Resized images of a catalogue, as uint8 pixels and their row.

    Args:
        catalog: n images.
        preprocess: gives the size.
        keep_in_memory: decode all of them now, with threads.

    Attributes:
        kept: their pixels (n, 3, size, size) uint8, if they are kept.
    """

    def __init__(self, catalog: Catalog, preprocess: Preprocess, keep_in_memory: bool = False) -> None:
        self.catalog = catalog
        self.preprocess = preprocess
        self.kept = _decode_all(catalog, preprocess) if keep_in_memory else None

    def __len__(self) -> int:
        return len(self.catalog)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch: ``rows`` (batch,) int64 and ``pixels`` (batch, 3, size, size) uint8."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        if self.kept is not None:
            return {"rows": index, "pixels": self.kept[index]}
        pixels = np.concatenate([read_pixels(self.catalog, self.preprocess, range(row, row + 1)) for row in rows])
        return {"rows": index, "pixels": torch.from_numpy(pixels)}


class EpochSampler(Sampler[int]):
    """Rows in an order that depends on the seed and the epoch alone, dealt to processes.

    An epoch is cut into batches of ``world * batch_size`` rows, of which each process takes its part in
    turn: two processes together see the very batches that one of twice their batch size sees. An
    incomplete last batch is left out.

    Args:
        products: (n,) product of each row.
        config: batch size of a process, and how many rows of a product an epoch has.
        seed: of the order.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self, products: NDArray[np.str_], config: LoaderConfig, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        _, self._labels, counts = np.unique(products, return_inverse=True, return_counts=True)
        wanted = np.minimum(counts, config.max_per_product) if config.max_per_product else counts
        self._counts, self._wanted = counts, np.maximum(wanted, config.min_per_product)
        self._batch, self._rank, self._world = config.batch_size, rank, world
        self.seed = seed
        self.epoch = 0
        self.rows_of_all = int(self._wanted.sum())
        self.batches = self.rows_of_all // (world * config.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        dealt = self.order()[: self.batches * self._world * self._batch].reshape(-1, self._world, self._batch)
        return iter(dealt[:, self._rank].ravel().tolist())

    def __len__(self) -> int:
        return self.batches * self._batch

    def order(self) -> NDArray[np.int64]:
        """The epoch's rows of all processes: (rows_of_all,) int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self._labels), generator=generator).numpy()
        if np.array_equal(self._wanted, self._counts):
            return order
        # By product, each product's rows still in random order: the first ones are the ones drawn.
        order = order[np.argsort(self._labels[order], kind="stable")]
        labels = self._labels[order]
        place = np.arange(len(order)) - (np.cumsum(self._counts) - self._counts)[labels]
        whole, rest = np.divmod(self._wanted, self._counts)
        drawn = np.repeat(order, whole[labels] + (place < rest[labels]))
        return drawn[torch.randperm(len(drawn), generator=generator).numpy()]


def training_loader(
    dataset: ImageDataset, config: LoaderConfig, seed: int, rank: int = 0, world: int = 1
) -> DataLoader[dict[str, Tensor]]:
    """Shuffled batches of this process; an incomplete last one is left out.

    Raises:
        UserError: an epoch has not one batch.
    """
    sampler = EpochSampler(dataset.catalog.products, config, seed, rank, world)
    if not sampler.batches:
        times = f" in each of {world} processes" if world > 1 else ""
        raise UserError(
            f"loader.batch_size: {config.batch_size}{times} is more than the {sampler.rows_of_all} training images "
            "of an epoch: lower it"
        )
    return _loader(dataset, config, sampler)


def validation_loader(
    dataset: ImageDataset, config: LoaderConfig, rank: int = 0, world: int = 1
) -> DataLoader[dict[str, Tensor]]:
    """All images, in order; of several processes each takes every ``world``-th.

    All processes have equally many: where the images do not come out even the last one is read again. The
    batches carry ``rows``, by which results are put in their place.
    """
    count = len(dataset)
    rows = np.arange(rank, -(-count // world) * world, world)
    return _loader(dataset, config, np.minimum(rows, count - 1).tolist())


def _loader(dataset: ImageDataset, config: LoaderConfig, rows: Iterable[int]) -> DataLoader[dict[str, Tensor]]:
    workers = 0 if dataset.kept is not None else config.workers
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=rows,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=_PREFETCH if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=partial(_begin_worker, warnings.filters[:1] == [_SILENCE]),
        multiprocessing_context=_server() if workers else None,
    )


def _server() -> BaseContext:
    """Python's fork server, in which no other thread of Python runs.

    A process that is forked from a training may find a lock taken for ever that one of the training's other threads
    held at that moment, and the training waits for it as long (python/cpython#112275 is one such lock).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _begin_worker(silent: bool, _: int) -> None:
    """Let a worker be as silent as its training, and end where that is killed.

    torch looks whether the worker's parent lives. That is the fork server, which itself waits for the last of its
    workers: both would stay for ever.
    """
    if silent:
        warnings.simplefilter("ignore")
    training = multiprocessing.parent_process()
    assert training is not None

    def wait() -> None:
        training.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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

    with ThreadPoolExecutor(len(available_cpus())) as pool:
        list(pool.map(decode_block, range(0, len(catalog), 64)))
    return torch.from_numpy(kept)
