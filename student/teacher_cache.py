"""The teacher's signal: its embeddings of the very views that the student sees, cached or computed beside it.

Cached embeddings are an artifact: a file per view and shard of images, so that a run that was killed goes on at the
next file, and a set of any size is looked up from disk.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from student.config import TargetsConfig
from student.teacher_model import TeacherModel
from vpr.artifacts.run_folder import atomic_save_npy, is_written, run_folder, run_lock, wait_until
from vpr.artifacts.store import (
    Artifact,
    find_up_to_date,
    load_artifact,
    reraise_as_artifact_error,
    write_artifact,
)
from vpr.common.distributed import compute_device, is_first, rank_and_world
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import ImageDataset, Normalise, validation_loader
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.config import ViewConfig
from vpr.retrieval.embeddings import l2_normalize
from vpr.training.loop import best_precision

log = get_logger(__name__)

_BATCH = 256
_KEPT = 2 << 30  # bytes of a shard's pixels that are kept for its next view


@dataclass(frozen=True)
class TeacherCache:
    """Cached teacher embeddings.

    Attributes:
        shards: of each view, (images, dim) float16 arrays, memory-mapped, L2-normalised.
        size: images in each shard but the last.
        artifact: where they are.
    """

    shards: list[list[NDArray[np.float16]]]
    size: int
    artifact: Artifact

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards[0])

    def lookup(self, rows: NDArray[np.int64], view: int | NDArray[np.int64]) -> NDArray[np.float32]:
        """(batch,) rows, and one view or that of each, to (batch, dim) float32."""
        out = np.empty((len(rows), self.shards[0][0].shape[1]), dtype=np.float32)
        places = np.broadcast_to(view, rows.shape) * len(self.shards[0]) + rows // self.size
        for place in np.unique(places):
            here = places == place
            of_view, shard = divmod(int(place), len(self.shards[0]))
            out[here] = self.shards[of_view][shard][rows[here] - shard * self.size]
        return out

    def draw(self, size: int, seed: int) -> NDArray[np.float32]:
        """A seeded draw of at most ``size`` images, each in a random view: (size, dim) float32, of unit length."""
        rng = np.random.default_rng(seed)
        images = rng.permutation(len(self))[:size]
        return l2_normalize(self.lookup(images, rng.integers(0, len(self.shards), len(images))))


def build_teacher_cache(
    path: str,
    source: TeacherModel,
    catalog: Catalog,
    views: ViewConfig,
    config: TargetsConfig,
    seed: int,
    loader: LoaderConfig | None = None,
) -> TeacherCache:
    """Embed seeded views of every image, or load them if that was done.

    Every finished file is kept when the process is killed, and not computed again. Several processes share the files.

    Args:
        path: where the artifact is written.
        source: the network.
        catalog: the training images.
        views: augmentation.
        config: how many views, and images in a file.
        seed: of the views.
        loader: workers that decode, and whether pixels are kept in memory.
    """
    values = {
        "views": asdict(views),
        "count": config.views,
        "shard": config.shard,
        "seed": seed,
        "images": _ordered_sha256(catalog),
    }
    parents = [source.artifact.as_parent("teacher")]
    folder = run_folder(path, values, parents)
    if find_up_to_date(path, "views", values, parents):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed after its artifact was there
        log.info(f"{path}: up to date")
        return _load(path)
    log.info(
        f"views: {config.views} of each of {len(catalog)} images, {source.dim} dimensions, "
        f"{cache_bytes(len(catalog), source.dim, config) / 1e6:.1f} MB"
    )
    files = list(_files(len(catalog), config))
    with run_lock(folder):
        _embed_files(files, folder, source, catalog, views, seed, loader or LoaderConfig())
        if is_first():
            for file in files:
                wait_until(partial(_is_complete, folder / file.name, file, source.dim))
            with write_artifact(path, "views", values, parents) as draft:
                for file in files:
                    _link(folder / file.name, draft.path / file.name)
                draft.preprocess, draft.embedding = source.preprocess, source.artifact.card.embedding
                draft.catalog = catalog.summary()
            shutil.rmtree(folder)
        else:
            wait_until(lambda: is_written(path, values, parents))
    return _load(path)


def cache_bytes(images: int, dim: int, config: TargetsConfig) -> int:
    """Exact size of the cache's files."""
    return sum(_npy_bytes(file.stop - file.start, dim) for file in _files(images, config))


@dataclass(frozen=True)
class _CacheFile:
    view: int
    shard: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"view-{self.view:04d}-shard-{self.shard:05d}.npy"


def _files(images: int, config: TargetsConfig) -> Iterator[_CacheFile]:
    for view in range(config.views):
        for shard, start in enumerate(range(0, images, config.shard)):
            yield _CacheFile(view, shard, start, min(images, start + config.shard))


def _embed_files(
    files: list[_CacheFile],
    folder: Path,
    source: TeacherModel,
    catalog: Catalog,
    views: ViewConfig,
    seed: int,
    loader: LoaderConfig,
) -> None:
    """Compute this process's part of the files that are not there: all views of its shards, one after the other."""
    rank, world = rank_and_world()
    # A process decodes its shards once for all their views; where there are fewer shards, each takes views.
    by_shard = files[-1].shard + 1 >= world
    mine_of = [file for file in files if (file.shard if by_shard else file.view) % world == rank]
    absent = [file for file in mine_of if not _is_complete(folder / file.name, file, source.dim)]
    settings = LoaderConfig(_BATCH, workers=loader.workers)
    source.network.to(device=compute_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    for shard in sorted({file.shard for file in absent}):
        mine = [file for file in absent if file.shard == shard]
        part = catalog.take(np.arange(mine[0].start, mine[0].stop))
        keep = loader.keep_in_memory or 3 * source.preprocess.size**2 * len(part) <= _KEPT
        images = ImageDataset(part, source.preprocess, keep)
        for file in mine:
            atomic_save_npy(folder / file.name, _embed_view(source, images, settings, views, file, seed))


def _embed_view(
    source: TeacherModel, images: ImageDataset, loader: LoaderConfig, views: ViewConfig, file: _CacheFile, seed: int
) -> NDArray[np.float16]:
    normalise, device = Normalise(source.preprocess), next(source.network.parameters()).device
    parts = []
    for batch in validation_loader(images, loader):
        rows = batch["rows"] + file.start
        parameters = draw_views(views, seed, rows, torch.full_like(rows, file.view))
        pixels = apply_views(batch["pixels"].to(device), parameters)
        parts.append(embed_pixels(source.network, normalise, pixels).cpu().numpy())
    return l2_normalize(np.concatenate(parts)).astype(np.float16)


def embed_pixels(teacher: nn.Module, normalise: Normalise, pixels: Tensor) -> Tensor:
    """The teacher's (batch, dim) float32 embeddings of (batch, 3, size, size) pixels 0…255, without gradients."""
    half = best_precision() == "bf16-mixed"
    with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
        return teacher(normalise.to(pixels.device)(pixels)).float()


def _ordered_sha256(catalog: Catalog) -> str:
    """Checksum of the images in their order: cached rows are looked up by position."""
    columns = (catalog.table[name].to_pylist() for name in ("image", "sha256", "box"))
    return hashlib.sha256(repr(list(zip(*columns, strict=True))).encode()).hexdigest()


def _npy_bytes(rows: int, dim: int) -> int:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)})
    return len(header.getvalue()) + 2 * rows * dim


def _link(source: Path, destination: Path) -> None:
    """The same file under a second name, or a copy where the file system has no links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _is_complete(path: Path, file: _CacheFile, dim: int) -> bool:
    return path.is_file() and path.stat().st_size == _npy_bytes(file.stop - file.start, dim)


def _load(path: str) -> TeacherCache:
    artifact = load_artifact(path, "views")
    shards: dict[str, list[NDArray[np.float16]]] = {}
    with reraise_as_artifact_error(artifact):
        for name in sorted(artifact.card.files):
            array = np.load(artifact.file(name), mmap_mode="r", allow_pickle=False)
            shards.setdefault(name.partition("-shard-")[0], []).append(array)
        return TeacherCache(list(shards.values()), int(artifact.card.config["shard"]), artifact)
