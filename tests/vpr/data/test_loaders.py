from __future__ import annotations

import threading
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vpr.common.errors import UserError
from vpr.data import loaders
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import EpochSampler, ImageDataset, decoding_workers, training_loader, validation_loader
from vpr.imaging.preprocess import Preprocess

PREPROCESS = Preprocess(size=16)
LOCK = threading.Lock()


class LockedDataset(ImageDataset):
    """Dataset that needs a lock to read."""

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        assert LOCK.acquire(timeout=20)
        LOCK.release()
        return super().__getitems__(rows)


class WarningDataset(ImageDataset):
    """Dataset that warns, as Pillow does of a broken tag, and returns whether the warning was recorded."""

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        with warnings.catch_warnings(record=True) as recorded:
            warnings.warn(f"a broken tag of {rows}", UserWarning, stacklevel=1)
        return super().__getitems__(rows) | {"warnings": torch.tensor(len(recorded))}


def _names(counts: list[int]) -> np.ndarray:
    names = np.repeat([f"p{number}" for number in range(len(counts))], counts)
    return np.random.default_rng(0).permutation(names)


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    max_per_product=st.integers(0, 12),
    min_per_product=st.integers(0, 12),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_epoch_respects_limits_per_product(
    counts: list[int], max_per_product: int, min_per_product: int, seed: int, epoch: int
) -> None:
    min_per_product = min(min_per_product, max_per_product) if max_per_product else min_per_product
    names = _names(counts)
    sampler = EpochSampler(
        names, LoaderConfig(1, max_per_product=max_per_product, min_per_product=min_per_product), seed
    )
    sampler.set_epoch(epoch)
    rows = list(sampler)
    assert len(rows) == len(sampler)
    sampled = Counter(names[rows].tolist())
    for name, count in Counter(names.tolist()).items():
        assert sampled[name] == max(min(count, max_per_product or count), min_per_product)
        times = [rows.count(row) for row in np.flatnonzero(names == name).tolist()]
        assert max(times) - min(times) <= 1  # no image is repeated before all are sampled
    again = EpochSampler(names, LoaderConfig(1, max_per_product=max_per_product, min_per_product=min_per_product), seed)
    again.set_epoch(epoch)
    assert list(again) == rows


def test_epochs_sample_different_images_of_a_product() -> None:
    sampler = EpochSampler(_names([200, 5]), LoaderConfig(1, max_per_product=40), 0)
    epochs = []
    for epoch in range(60):
        sampler.set_epoch(epoch)
        epochs.append(frozenset(sampler))
    assert len(set(epochs)) == 60
    assert frozenset().union(*epochs) == set(range(205))
    assert list(sampler) != sorted(sampler)


def test_order_is_the_permutation_of_seed_and_epoch() -> None:
    sampler = EpochSampler(_names([7, 9]), LoaderConfig(1), seed=3)
    sampler.set_epoch(2)
    assert list(sampler) == torch.randperm(16, generator=torch.Generator().manual_seed(3_000_011)).tolist()


@pytest.mark.parametrize("limits", [{}, {"max_per_product": 8, "min_per_product": 4}])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one_process(world: int, limits: dict[str, int]) -> None:
    names = _names([1, 3, 9, 20, 14])
    single = EpochSampler(names, LoaderConfig(8, **limits), 0)
    parts = [EpochSampler(names, LoaderConfig(8 // world, **limits), 0, rank, world) for rank in range(world)]
    for epoch in range(2):
        for sampler in (single, *parts):
            sampler.set_epoch(epoch)
        batches = np.array(list(single)).reshape(-1, 8)
        shares = [np.array(list(part)).reshape(len(batches), -1) for part in parts]
        np.testing.assert_array_equal(np.concatenate(shares, axis=1), batches)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=12),
    size=st.integers(2, 5),
    max_per_product=st.sampled_from([0, 6]),
    epoch=st.integers(0, 3),
)
def test_batches_hold_groups_of_images_of_a_product(
    counts: list[int], size: int, max_per_product: int, epoch: int
) -> None:
    names = _names(counts)
    config = LoaderConfig(2 * size, max_per_product=max_per_product, images_per_product=size)
    sampler = EpochSampler(names, config, 0)
    sampler.set_epoch(epoch)
    groups = np.array(list(sampler)).reshape(-1, size)
    assert len(groups) == 2 * sampler.batches
    assert all(len(set(names[group])) == 1 for group in groups)
    for name, count in Counter(names.tolist()).items():
        rows = groups[names[groups[:, 0]] == name]
        expected = -(-min(count, max_per_product or count) // size)
        assert expected - 1 <= len(rows) <= expected  # the incomplete last batch is dropped
        if count >= size:
            assert all(len(set(group)) == size for group in rows.tolist())
    parts = [EpochSampler(names, LoaderConfig(size, 0, False, max_per_product, 0, size), 0, rank, 2) for rank in (0, 1)]
    for part in parts:
        part.set_epoch(epoch)
    shares = [np.array(list(part)).reshape(-1, size) for part in parts]
    np.testing.assert_array_equal(np.stack(shares, axis=1).reshape(-1, size), groups)


def test_groups_of_a_product_are_spread_over_the_epoch() -> None:
    names = _names([40] * 10)
    sampler = EpochSampler(names, LoaderConfig(20, images_per_product=4), 0)
    batches = names[np.array(list(sampler))].reshape(-1, 20)
    assert all(len(set(batch)) == 5 for batch in batches)
    assert len(batches) == 20


def test_batches_by_category_hold_one_category() -> None:
    products = np.array([f"{category}-{number}" for category in "abc" for number in range(8) for _ in range(3)])
    categories = np.array([name[0] for name in products])
    sampler = EpochSampler(products, LoaderConfig(12, by_category=True), 0, categories=categories)
    first = np.array(list(sampler)).reshape(-1, 12)
    assert all(len(set(categories[batch])) == 1 for batch in first)
    assert sorted(first.ravel().tolist()) == list(range(72))
    sampler.set_epoch(1)
    assert not np.array_equal(first, np.array(list(sampler)).reshape(-1, 12))


@pytest.mark.parametrize("categories", [None, np.array(["", "", ""])])
def test_batches_by_category_need_categories(categories: np.ndarray | None) -> None:
    with pytest.raises(UserError, match=r"loader\.by_category: the catalogue has no categories"):
        EpochSampler(_names([1, 2]), LoaderConfig(1, by_category=True), 0, categories=categories)


@pytest.mark.parametrize("size", [0, 2])
def test_neighbours_share_a_batch(size: int) -> None:
    products = np.repeat([f"{number:02d}" for number in range(12)], 4)
    sampler = EpochSampler(products, LoaderConfig(8 if size else 4, images_per_product=size), 0)
    sampler.neighbours = np.array([[number + 1 - 2 * (number % 2), -1] for number in range(12)])
    rows = np.array(list(sampler))
    assert sorted(rows.tolist()) == list(range(48))
    for batch in rows.reshape(sampler.batches, -1):
        numbers = Counter((batch // 4).tolist())
        assert all(numbers[number] == numbers[number ^ 1] for number in numbers)


def test_200k_rows_are_sampled_in_seconds() -> None:
    names = np.array([f"products10k/{row % 9691}" for row in range(200_000)])
    start = time.monotonic()
    sampler = EpochSampler(names, LoaderConfig(64, max_per_product=18, min_per_product=15), 0)
    assert len(list(sampler)) == 9691 * 18 // 64 * 64
    sampler = EpochSampler(names, LoaderConfig(64, max_per_product=18, images_per_product=4), 0)
    sampler.neighbours = np.random.default_rng(0).integers(0, 9691, (9691, 3))
    assert len(list(sampler)) == 9691 * 20 // 64 * 64
    assert time.monotonic() - start < 20  # a bound against a loop over rows, not a benchmark


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_return_images_with_their_rows(catalog: Catalog, workers: int) -> None:
    dataset = ImageDataset(catalog.select(split="validation"), PREPROCESS)
    kept = ImageDataset(dataset.catalog, PREPROCESS, keep_in_memory=True)
    expected = kept.__getitems__(list(range(len(kept))))["pixels"]
    config = LoaderConfig(5, workers)
    batches = list(validation_loader(dataset, config))
    assert torch.cat([batch["rows"] for batch in batches]).tolist() == list(range(32))
    assert torch.equal(torch.cat([batch["pixels"] for batch in batches]), expected)
    rows = [batch["rows"] for batch in training_loader(dataset, config, 0)]
    assert [len(batch) for batch in rows] == [5] * 6
    assert len(set(torch.cat(rows).tolist())) == 30


def test_workers_do_not_inherit_locks(catalog: Catalog) -> None:
    """A forked worker would inherit a held lock, such as that of Python's list of threads."""
    dataset = LockedDataset(catalog.select(split="validation"), PREPROCESS)
    with LOCK:
        assert len(list(validation_loader(dataset, LoaderConfig(16, workers=1)))) == 2


@pytest.mark.parametrize("ignore", [True, False])
def test_workers_inherit_ignored_warnings(catalog: Catalog, ignore: bool) -> None:
    dataset = WarningDataset(catalog.select(split="validation"), PREPROCESS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if ignore else "always")
        counts = [batch["warnings"].item() for batch in validation_loader(dataset, LoaderConfig(16, workers=1))]
    assert counts == [0 if ignore else 1] * 2


def test_pixels_in_memory_need_no_workers(catalog: Catalog) -> None:
    dataset = ImageDataset(catalog.select(split="validation"), PREPROCESS, keep_in_memory=True)
    assert training_loader(dataset, LoaderConfig(5, workers=2), 0).num_workers == 0


@pytest.mark.parametrize(
    ("cpus", "processes", "has_gpu", "workers"),
    [(2, 1, False, 0), (64, 1, False, 0), (2, 1, True, 1), (1, 1, True, 1), (8, 1, True, 7), (16, 1, True, 12)]
    + [(64, 8, True, 7), (16, 8, True, 1)],
)
def test_workers_follow_processors_and_gpu(
    cpus: int, processes: int, has_gpu: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "available_cpus", lambda: list(range(cpus)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert decoding_workers(LoaderConfig().workers) == workers
    assert decoding_workers(3) == 3


@pytest.mark.parametrize("world", [1, 3, 5, 40])
def test_processes_validate_images_in_equal_batches(catalog: Catalog, world: int) -> None:
    dataset = ImageDataset(catalog.select(split="validation"), PREPROCESS, keep_in_memory=True)
    config = LoaderConfig(4)
    shares = [[b["rows"].tolist() for b in validation_loader(dataset, config, rank, world)] for rank in range(world)]
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1
    assert {row for share in shares for batch in share for row in batch} == set(range(32))


def test_too_few_images_for_a_batch_are_rejected(catalog: Catalog) -> None:
    dataset = ImageDataset(catalog.select(split="validation"), PREPROCESS)
    with pytest.raises(UserError, match=r"loader\.batch_size: 33 is more than the 32 training images of an epoch"):
        training_loader(dataset, LoaderConfig(33), 0)
    with pytest.raises(UserError, match="17 in each of 2 processes is more than the 32"):
        training_loader(dataset, LoaderConfig(17), 0, rank=1, world=2)
    with pytest.raises(UserError, match="9 is more than the 8"):
        training_loader(dataset, LoaderConfig(9, max_per_product=2), 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, r"loader\.batch_size: expected 1 or more, got 0"),
        ({"workers": -1}, r"loader\.workers: expected 0 to 512, got -1"),
        ({"cache_gb": -1.0}, r"loader\.cache_gb: expected 0 to 1000000.0, got -1"),
        ({"max_per_product": -1}, r"loader\.max_per_product: expected 0 to 1048576, got -1"),
        ({"min_per_product": -2}, r"loader\.min_per_product: expected 0 to 10000, got -2"),
        ({"images_per_product": -1}, r"loader\.images_per_product: expected 0 to 10000, got -1"),
        (
            {"batch_size": 10, "images_per_product": 4},
            r"loader\.batch_size: expected a multiple of loader\.images_per_product 4, got 10",
        ),
        (
            {"max_per_product": 5, "min_per_product": 6},
            r"loader\.min_per_product: expected at most loader\.max_per_product 5, got 6",
        ),
    ],
)
def test_values_out_of_range_are_rejected(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoaderConfig(**values)


_LEFT = "images in each epoch; 52 of 180 images are left out of it"


@pytest.mark.parametrize(
    ("images", "batch", "text"),
    [
        (
            180,
            128,
            "1 step of 128 images in each epoch; 52 of 180 images are left out of it. Try --loader.batch-size " + "16",
        ),
        (180, 16, ""),
        (4, 2, "2 steps of 2 images in each epoch"),
    ],
)
def test_epochs_of_few_steps_are_reported(images: int, batch: int, text: str) -> None:
    sampler = EpochSampler(np.arange(images).astype(np.str_), LoaderConfig(batch_size=batch), 0)
    assert sampler.describe_few_steps() == text
