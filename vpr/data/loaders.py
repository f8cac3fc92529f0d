"""Data loaders of the training loop: decoding once or by workers, in an order that only the seed decides."""

import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from vpr.common.errors import UserError
from vpr.common.hardware import available_cpus
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.pixel_cache import CacheSpace, PixelCache
from vpr.data.pixels import read_pixels
from vpr.data.product_batches import group_by_product, shuffle_batches, sort_by_category, sort_by_neighbours
from vpr.imaging.config import ViewConfig
from vpr.imaging.preprocess import Preprocess

_IGNORE_ALL = ("ignore", None, Warning, None, 0)  # the first filter after simplefilter("ignore")
_PREFETCH = 4  # batches per worker; decoding times vary
_DECODE_BLOCK = 64  # images per task of a decoding thread
# One worker decodes 29 photographs of 12 megapixels a second; 12 supply a ViT-H-14 on the fastest GPUs.
_MAX_AUTO_WORKERS = 12


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Resized images of a catalogue, as uint8 pixels with their row.

    ``views`` are cut from the images: these are then larger, with ``side`` pixels (:meth:`ViewConfig.decoded_side`).
    With ``keep_in_memory`` threads decode all images now; ``kept`` then holds (n, 3, side, side) uint8.
    """

    def __init__(
        self,
        catalog: Catalog,
        preprocess: Preprocess,
        keep_in_memory: bool = False,
        views: Sequence[ViewConfig] = (),
    ) -> None:
        self.catalog = catalog
        self.preprocess = preprocess
        self.side = max([preprocess.size, *(config.decoded_side(preprocess.size) for config in views)])
        self.kept = _decode_all(catalog, preprocess, self.side) if keep_in_memory else None
        self.cache: PixelCache | None = None

    def use_cache(self, space: CacheSpace) -> None:
        """Store decoded images on disk at their first reading, if they are not in memory."""
        if self.kept is None:
            self.cache = space.take(self.catalog, self.preprocess, self.side)

    @property
    def caches(self) -> list[PixelCache]:
        """Caches on disk."""
        return [] if self.cache is None else [self.cache]

    def __len__(self) -> int:
        return len(self.catalog)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """Return a batch: ``rows`` (batch,) int64 and ``pixels`` (batch, 3, side, side) uint8."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        if self.kept is not None:
            return {"rows": index, "pixels": self.kept[index]}
        return {"rows": index, "pixels": torch.from_numpy(np.stack([self._read(row) for row in rows]))}

    def _read(self, row: int) -> NDArray[np.uint8]:
        pixels = None if self.cache is None else self.cache.read(row)
        if pixels is None:
            pixels = read_pixels(self.catalog, self.preprocess, range(row, row + 1), self.side)[0]
            if self.cache is not None:
                self.cache.write(row, pixels)
        return pixels


_FEW_STEPS = 10  # of an epoch: a plan warns below


class EpochSampler(Sampler[int]):
    """Sample rows in an order that depends only on seed and epoch, shared between processes.

    An epoch consists of batches of ``world * batch_size`` rows, which the processes share. So two processes
    together see the batches that one process with twice the batch size sees. An incomplete last batch is dropped.
    ``products`` and ``categories`` are the (n,) product and category of each row. Set ``neighbours``, the (products, k)
    most similar products of each product in the order of their names, to put similar products into a batch.

    Raises:
        UserError: Batches by category are requested without categories.
    """

    def __init__(
        self,
        products: NDArray[np.str_],
        config: LoaderConfig,
        seed: int,
        rank: int = 0,
        world: int = 1,
        categories: NDArray[np.str_] | None = None,
    ) -> None:
        _, self._labels, counts = np.unique(products, return_inverse=True, return_counts=True)
        targets = np.minimum(counts, config.max_per_product) if config.max_per_product else counts
        self._group = config.images_per_product or 1
        targets = -(-np.maximum(targets, config.min_per_product) // self._group) * self._group
        self._counts, self._target_counts = counts, targets
        self._batch, self._rank, self._world = config.batch_size, rank, world
        self._categories = categories if config.by_category else None
        if config.by_category and (categories is None or not np.any(categories != "")):
            raise UserError(
                "loader.by_category: the catalogue has no categories. Add them or use --no-loader.by-category."
            )
        self.neighbours: NDArray[np.int64] | None = None
        self.seed = seed
        self.epoch = 0
        self.rows_of_all = int(self._target_counts.sum())
        self.batches = self.rows_of_all // (world * config.batch_size)

    def describe_few_steps(self, accumulate: int = 1) -> str:
        """Return a warning if an epoch has fewer than ten steps, else an empty text."""
        steps, images = -(-self.batches // accumulate), self._world * self._batch
        if not 0 < steps < _FEW_STEPS:
            return ""
        text = f"{steps} {'step' if steps == 1 else 'steps'} of {images * min(accumulate, self.batches)} images"
        text += " in each epoch"
        if left := self.rows_of_all - self.batches * images:
            text += f"; {left} of {self.rows_of_all} images are left out of it"
        size = self.rows_of_all // (_FEW_STEPS * self._world * accumulate)
        size = 1 << size.bit_length() - 1 if size else 0
        return text + (f". Try --loader.batch-size {size}" if 2 <= size < self._batch else "")

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        batches = self.order()[: self.batches * self._world * self._batch].reshape(-1, self._world, self._batch)
        return iter(batches[:, self._rank].ravel().tolist())

    def __len__(self) -> int:
        return self.batches * self._batch

    def order(self) -> NDArray[np.int64]:
        """Return the epoch's rows of all processes, at least those of the full batches, as int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self._labels), generator=generator).numpy()
        if self._group > 1 or self._categories is not None or self.neighbours is not None:
            return self._grouped_order(order, generator)
        if np.array_equal(self._target_counts, self._counts):
            return order
        # Group the rows by product. Each product's rows stay in random order; the first ones are sampled.
        order = order[np.argsort(self._labels[order], kind="stable")]
        labels = self._labels[order]
        rank_in_product = np.arange(len(order)) - (np.cumsum(self._counts) - self._counts)[labels]
        repeats, remainder = np.divmod(self._target_counts, self._counts)
        sampled = np.repeat(order, repeats[labels] + (rank_in_product < remainder[labels]))
        return sampled[torch.randperm(len(sampled), generator=generator).numpy()]

    def _grouped_order(self, order: NDArray[np.int64], generator: torch.Generator) -> NDArray[np.int64]:
        draws = torch.rand(len(self._counts), generator=generator, dtype=torch.float64).numpy()
        groups, products = group_by_product(order, self._labels, self._target_counts, self._group, draws)
        if self.neighbours is not None:
            groups = groups[sort_by_neighbours(products, self.neighbours)]
        elif self._categories is not None:
            groups = groups[sort_by_category(self._categories, groups, generator)]
        return shuffle_batches(groups, self._world * self._batch // self._group, generator).ravel()


def training_loader(
    dataset: ImageDataset, config: LoaderConfig, seed: int, rank: int = 0, world: int = 1
) -> DataLoader[dict[str, Tensor]]:
    """Build the loader of shuffled full batches; raise :class:`UserError` if an epoch has fewer images than one."""
    catalog = dataset.catalog
    categories = catalog.categories if config.by_category else None
    sampler = EpochSampler(catalog.products, config, seed, rank, world, categories)
    if not sampler.batches:
        processes = f" in each of {world} processes" if world > 1 else ""
        limit = f"the {sampler.rows_of_all} training images of an epoch"
        raise UserError(f"loader.batch_size: {config.batch_size}{processes} is more than {limit}. Lower it.")
    return _loader(dataset, config, sampler)


def validation_loader(
    dataset: ImageDataset, config: LoaderConfig, rank: int = 0, world: int = 1
) -> DataLoader[dict[str, Tensor]]:
    """Build the loader of all images in order, of which each process reads every ``world``-th.

    All processes read the same number of images; some may read the last image again. ``rows`` of each batch tell
    which images it holds.
    """
    count = len(dataset)
    rows = np.arange(rank, -(-count // world) * world, world)
    return _loader(dataset, config, np.minimum(rows, count - 1).tolist())


def decoding_workers(workers: int | Literal["auto"]) -> int:
    """Return the number of decoding processes of each training process.

    ``auto`` is none without a GPU, because the network then computes on all processors. With a GPU it is one for each
    processor but one, at least 1 and at most 12; the training processes of a machine share its processors.
    """
    if workers != "auto":
        return workers
    if not torch.cuda.is_available():
        return 0
    share = len(available_cpus()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_MAX_AUTO_WORKERS, max(1, share - 1))


def open_caches(datasets: Sequence[ImageDataset], folder: Path, config: LoaderConfig) -> None:
    """Let the data sets of a training run store decoded images in its folder, within ``cache_gb`` together.

    Files of earlier data sets there are removed.
    """
    space = CacheSpace(folder, int(config.cache_gb * 1e9))
    for dataset in datasets:
        dataset.use_cache(space)
    space.remove_others({cache.path for dataset in datasets for cache in dataset.caches})


def _loader(dataset: ImageDataset, config: LoaderConfig, rows: Iterable[int]) -> DataLoader[dict[str, Tensor]]:
    workers = 0 if dataset.kept is not None else decoding_workers(config.workers)
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=rows,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=_PREFETCH if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=partial(_init_worker, warnings.filters[:1] == [_IGNORE_ALL]),
        multiprocessing_context=_forkserver() if workers else None,
    )


def _forkserver() -> BaseContext:
    """Return the context of Python's fork server, in which no other Python thread runs.

    A worker forked from the training process may inherit a lock that another thread held, and deadlock the training
    run (python/cpython#112275 is such a lock).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _init_worker(ignore_warnings: bool, _: int) -> None:
    """Ignore warnings as the training process does, and exit when it is killed.

    torch only checks whether the worker's parent is alive. The parent is the fork server, which waits for its last
    worker, so both would run forever.
    """
    if ignore_warnings:
        warnings.simplefilter("ignore")
    training_process = multiprocessing.parent_process()
    assert training_process is not None

    def exit_with_training() -> None:
        training_process.join()
        os._exit(1)

    threading.Thread(target=exit_with_training, daemon=True).start()


class Normalise(nn.Module):
    """Layer that normalises pixels 0…255 by the card's preprocessing."""

    scale: Tensor
    offset: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        scale, offset = preprocess.scale_offset()
        self.register_buffer("scale", torch.from_numpy(scale), persistent=False)
        self.register_buffer("offset", torch.from_numpy(offset), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise (batch, 3, size, size) uint8 or float to float32, channels last (faster convolutions)."""
        return (pixels.float() * self.scale + self.offset).contiguous(memory_format=torch.channels_last)


def _identity(batch: Any) -> Any:
    return batch  # `__getitems__` has collated the batch already


def _decode_all(catalog: Catalog, preprocess: Preprocess, side: int) -> Tensor:
    kept = np.empty((len(catalog), 3, side, side), dtype=np.uint8)

    def decode_block(start: int) -> None:
        rows = range(start, min(start + _DECODE_BLOCK, len(catalog)))
        kept[rows.start : rows.stop] = read_pixels(catalog, preprocess, rows, side)

    with ThreadPoolExecutor(len(available_cpus())) as pool:
        list(pool.map(decode_block, range(0, len(catalog), _DECODE_BLOCK)))
    return torch.from_numpy(kept)
