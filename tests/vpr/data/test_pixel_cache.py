from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vpr.common.errors import UserError
from vpr.data import loaders
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import ImageDataset, open_caches, training_loader
from vpr.data.pixel_cache import PATTERN, CacheSpace, PixelCache, bytes_per_image
from vpr.imaging.config import ViewConfig
from vpr.imaging.preprocess import Preprocess

PREPROCESS = Preprocess(size=16)


def epoch(dataset: ImageDataset, workers: int = 0) -> torch.Tensor:
    """Return the pixels of an epoch, by row."""
    batches = list(training_loader(dataset, LoaderConfig(8, workers=workers), 0))
    order = torch.cat([batch["rows"] for batch in batches]).argsort()
    return torch.cat([batch["pixels"] for batch in batches])[order]


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by each row that is decoded."""
    decoded: list[int] = []
    read = loaders.read_pixels

    def recorded(catalog: Catalog, preprocess: Preprocess, rows: range, side: int | None = None) -> np.ndarray:
        decoded.extend(rows)
        return read(catalog, preprocess, rows, side)

    monkeypatch.setattr(loaders, "read_pixels", recorded)
    return decoded


def test_each_image_is_decoded_once(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = catalog.select(split="train")
    expected = epoch(ImageDataset(training, PREPROCESS, views=[ViewConfig()]))
    decoded = count_decoded(monkeypatch)
    dataset = ImageDataset(training, PREPROCESS, views=[ViewConfig()])
    open_caches([dataset], tmp_path, LoaderConfig(cache_gb=1))
    for _ in range(3):
        assert torch.equal(epoch(dataset), expected)
    assert sorted(decoded) == list(range(len(training)))
    # A resumed training run finds the images of the killed one.
    resumed = ImageDataset(training, PREPROCESS, views=[ViewConfig()])
    open_caches([resumed], tmp_path, LoaderConfig(cache_gb=1))
    assert torch.equal(epoch(resumed), expected)
    assert len(decoded) == len(training)


def test_workers_share_the_cache(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = catalog.select(split="train")
    expected = epoch(ImageDataset(training, PREPROCESS))
    dataset = ImageDataset(training, PREPROCESS)
    open_caches([dataset], tmp_path, LoaderConfig(cache_gb=1))
    assert torch.equal(epoch(dataset, workers=2), expected)
    decoded = count_decoded(monkeypatch)
    assert torch.equal(epoch(dataset), expected)
    assert decoded == []


def test_images_beyond_the_space_are_decoded_again(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = catalog.select(split="train")
    expected = epoch(ImageDataset(training, PREPROCESS))
    dataset = ImageDataset(training, PREPROCESS)
    space = LoaderConfig(cache_gb=(20 * bytes_per_image(16) + 5) / 1e9)
    open_caches([dataset, ImageDataset(training, PREPROCESS)], tmp_path, space)
    (file,) = tmp_path.glob(PATTERN)
    assert file.stat().st_size == 20 * bytes_per_image(16) <= space.cache_gb * 1e9
    epoch(dataset)
    decoded = count_decoded(monkeypatch)
    assert torch.equal(epoch(dataset), expected)
    assert sorted(decoded) == list(range(20, len(training)))


@pytest.mark.parametrize("damage", ["pixels", "checksum"])
def test_damaged_image_is_decoded_again(damage: str, catalog: Catalog, tmp_path: Path) -> None:
    training = catalog.select(split="train")
    dataset = ImageDataset(training, PREPROCESS)
    open_caches([dataset], tmp_path, LoaderConfig(cache_gb=1))
    expected = epoch(dataset)
    (file,) = tmp_path.glob(PATTERN)
    data = bytearray(file.read_bytes())
    data[8 * len(training) + 3 * 16 * 16 * 5 if damage == "pixels" else 8 * 5] ^= 1
    file.write_bytes(data)
    assert dataset.cache is not None
    assert dataset.cache.read(5) is None
    assert torch.equal(epoch(dataset), expected)
    assert dataset.cache.read(5) is not None


def test_files_of_other_images_are_removed(catalog: Catalog, tmp_path: Path) -> None:
    training = catalog.select(split="train")
    for size in (16, 24):
        dataset = ImageDataset(training, Preprocess(size=size))
        open_caches([dataset], tmp_path, LoaderConfig(cache_gb=1))
    assert [path.stat().st_size for path in tmp_path.glob(PATTERN)] == [len(training) * bytes_per_image(24)]
    open_caches([ImageDataset(training, PREPROCESS)], tmp_path, LoaderConfig())
    assert list(tmp_path.glob(PATTERN)) == []


def test_pixels_in_memory_need_no_cache(catalog: Catalog, tmp_path: Path) -> None:
    dataset = ImageDataset(catalog.select(split="train"), PREPROCESS, keep_in_memory=True)
    open_caches([dataset], tmp_path, LoaderConfig(cache_gb=1))
    assert dataset.caches == []


def test_full_disk_is_reported_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    path = tmp_path / "pixels-0.cache"
    with pytest.raises(UserError, match=r"loader\.cache_gb: .* cannot reserve 0\.1 GB \(No space left on device\)"):
        PixelCache(path, 1000, 200)
    assert not path.exists()


def test_other_images_have_another_file(catalog: Catalog, tmp_path: Path) -> None:
    paths = set()
    for split in ("train", "validation"):
        for preprocess in (PREPROCESS, PREPROCESS.model_copy(update={"interpolation": "bilinear"})):
            cache = CacheSpace(tmp_path, 1 << 20).take(catalog.select(split=split), preprocess, 16)
            assert cache is not None
            paths.add(cache.path)
    assert len(paths) == 4
