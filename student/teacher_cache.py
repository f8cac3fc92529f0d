"""Cache of teacher embeddings of the seeded views that the student trains on.

The cache is an artifact with one file per view and shard of images. A killed process resumes at the next file.
Files are memory-mapped, so a cache may exceed the memory.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from student.config import TargetsConfig
from student.teacher_model import TeacherModel
from vpr.artifacts.card import Parent
from vpr.artifacts.run_folder import atomic_save_npy, is_written, run_lock, wait_until
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.config_values import config_values
from vpr.common.distributed import compute_device, is_first, rank_and_world
from vpr.common.errors import UserError
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
_MAX_KEPT_BYTES = 2 << 30  # Pixels of a shard that stay in memory for its next view.


@dataclass(frozen=True)
class TeacherCache:
    """Cached teacher embeddings.

    Attributes:
        shards: Arrays by view and shard: (images, dim) float16, memory-mapped, L2-normalised.
        shard_size: Number of images in each shard but the last.
        artifact: Artifact of kind ``views`` that holds them.
    """

    shards: list[list[NDArray[np.float16]]]
    shard_size: int
    artifact: Artifact

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards[0])

    def lookup(self, rows: NDArray[np.int64], view: int | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (batch, dim) float32 embeddings of (batch,) rows in one view, or in (batch,) views."""
        out = np.empty((len(rows), self.shards[0][0].shape[1]), dtype=np.float32)
        files = np.broadcast_to(view, rows.shape) * len(self.shards[0]) + rows // self.shard_size
        for file in np.unique(files):
            selected = files == file
            file_view, shard = divmod(int(file), len(self.shards[0]))
            out[selected] = self.shards[file_view][shard][rows[selected] - shard * self.shard_size]
        return out

    def sample(self, size: int, seed: int) -> NDArray[np.float32]:
        """Return at most (size, dim) float32 embeddings of random images, each in a random view."""
        rng = np.random.default_rng(seed)
        images = rng.permutation(len(self))[:size]
        return l2_normalize(self.lookup(images, rng.integers(0, len(self.shards), len(images))))


def build_teacher_cache(
    path: str,
    teacher: TeacherModel,
    catalog: Catalog,
    views: ViewConfig,
    config: TargetsConfig,
    seed: int,
    loader: LoaderConfig | None = None,
    is_shared: bool = False,
) -> TeacherCache:
    """Embed seeded views of every image, or load the cache at ``path`` if it is up to date.

    A killed process keeps every finished file. Several processes share the work.

    Raises:
        UserError: ``is_shared``, and the cache at ``path`` has other settings, which other students may use.
    """
    values = {"views": config_values(views), "count": config.views, "shard": config.shard, "seed": seed}
    values["images"] = _ordered_sha256(catalog)
    parents = [teacher.artifact.as_parent("teacher")]
    stage = Stage(path, "views", values, parents)
    folder = stage.run_folder
    if artifact := stage.find():
        shutil.rmtree(folder, ignore_errors=True)  # A process killed after writing the artifact leaves it.
        return _open_cache(artifact)
    if is_shared:
        _reject_other_cache(path, values, parents)
    size = f"{teacher.dim} dimensions, {cache_bytes(len(catalog), teacher.dim, config) / 1e6:.1f} MB"
    log.info(f"views: {config.views} of each of {len(catalog)} images, {size}")
    files = list(_cache_files(len(catalog), config))
    with run_lock(folder):
        _embed_files(files, folder, teacher, catalog, views, seed, loader or LoaderConfig())
        if is_first():
            for file in files:
                wait_until(partial(_is_complete, folder / file.name, file, teacher.dim))
            if is_shared:  # another training run may have written its cache in the meantime
                _reject_other_cache(path, values, parents)
            with stage.write() as draft:
                for file in files:
                    _link(folder / file.name, draft.path / file.name)
                draft.preprocess, draft.embedding = teacher.preprocess, teacher.artifact.card.embedding
                draft.catalog = catalog.summary()
            shutil.rmtree(folder)
        else:
            wait_until(lambda: is_written(path, values, parents))
    return _open_cache(load_artifact(path, "views"))


def _reject_other_cache(path: str, values: dict[str, Any], parents: list[Parent]) -> None:
    """Raise :class:`UserError` if a complete cache of other settings is at ``path``; a damaged one is made again."""
    try:
        card = load_artifact(path, "views").card
    except UserError:
        return
    expected = json.loads(json.dumps(values))
    differing = [name for name in expected if card.config.get(name) != expected[name]]
    named = {"views": "views", "count": "targets.views", "shard": "targets.shard", "seed": "targets.seed"}
    reasons = [named.get(name, "the training images") for name in differing]
    reasons += ["the teacher"] if card.parents != parents else []
    if not reasons:  # another training run has just written the same cache
        return
    raise UserError(
        f"cache: {path} holds teacher embeddings of other settings ({', '.join(reasons)}), which other students may "
        "use. Choose another folder, or remove this one."
    )


def cache_bytes(images: int, dim: int, config: TargetsConfig) -> int:
    """Return the exact size of the files of a cache in bytes."""
    return sum(_npy_bytes(file.stop - file.start, dim) for file in _cache_files(images, config))


@dataclass(frozen=True)
class _CacheFile:
    view: int
    shard: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"view-{self.view:04d}-shard-{self.shard:05d}.npy"


def _cache_files(images: int, config: TargetsConfig) -> Iterator[_CacheFile]:
    for view in range(config.views):
        for shard, start in enumerate(range(0, images, config.shard)):
            yield _CacheFile(view, shard, start, min(images, start + config.shard))


def _embed_files(
    files: list[_CacheFile],
    folder: Path,
    teacher: TeacherModel,
    catalog: Catalog,
    views: ViewConfig,
    seed: int,
    loader: LoaderConfig,
) -> None:
    """Compute the missing files of this process, shard by shard with all views of a shard."""
    rank, world = rank_and_world()
    # A process decodes a shard once for all its views. With fewer shards than processes, each process takes views.
    by_shard = files[-1].shard + 1 >= world
    local_files = [file for file in files if (file.shard if by_shard else file.view) % world == rank]
    missing = [file for file in local_files if not _is_complete(folder / file.name, file, teacher.dim)]
    batches = LoaderConfig(_BATCH, workers=loader.workers)
    teacher.network.to(device=compute_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    for shard in sorted({file.shard for file in missing}):
        shard_files = [file for file in missing if file.shard == shard]
        part = catalog.take(np.arange(shard_files[0].start, shard_files[0].stop))
        side = views.decoded_side(teacher.preprocess.size)
        keep = loader.keep_in_memory or 3 * side**2 * len(part) <= _MAX_KEPT_BYTES
        images = ImageDataset(part, teacher.preprocess, keep, [views])
        for file in shard_files:
            atomic_save_npy(folder / file.name, _embed_view(teacher, images, batches, views, file, seed))


def _embed_view(
    teacher: TeacherModel, images: ImageDataset, loader: LoaderConfig, views: ViewConfig, file: _CacheFile, seed: int
) -> NDArray[np.float16]:
    normalise, device = Normalise(teacher.preprocess), next(teacher.network.parameters()).device
    parts = []
    for batch in validation_loader(images, loader):
        rows = batch["rows"] + file.start
        parameters = draw_views(views, seed, rows, torch.full_like(rows, file.view))
        pixels = apply_views(batch["pixels"].to(device), parameters, teacher.preprocess.size)
        parts.append(embed_pixels(teacher.network, normalise, pixels).cpu().numpy())
    return l2_normalize(np.concatenate(parts)).astype(np.float16)


def embed_pixels(teacher: nn.Module, normalise: Normalise, pixels: Tensor) -> Tensor:
    """Return (batch, dim) float32 embeddings, without gradients, of (batch, 3, size, size) pixels from 0 to 255."""
    is_bf16 = best_precision() == "bf16-mixed"
    with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=is_bf16):
        return teacher(normalise.to(pixels.device)(pixels)).float()


def _ordered_sha256(catalog: Catalog) -> str:
    """Return the checksum of the images in their order, since the cache is read by position."""
    columns = (catalog.table[name].to_pylist() for name in ("image", "sha256", "box"))
    return hashlib.sha256(repr(list(zip(*columns, strict=True))).encode()).hexdigest()


def _npy_bytes(rows: int, dim: int) -> int:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)})
    return len(header.getvalue()) + 2 * rows * dim


def _link(source: Path, destination: Path) -> None:
    """Link a file, or copy it if the file system has no links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _is_complete(path: Path, file: _CacheFile, dim: int) -> bool:
    return path.is_file() and path.stat().st_size == _npy_bytes(file.stop - file.start, dim)


def _open_cache(artifact: Artifact) -> TeacherCache:
    shards: dict[str, list[NDArray[np.float16]]] = {}
    with reraise_as_artifact_error(artifact):
        for name in sorted(artifact.card.files):
            array = np.load(artifact.file(name), mmap_mode="r", allow_pickle=False)
            shards.setdefault(name.partition("-shard-")[0], []).append(array)
        return TeacherCache(list(shards.values()), int(artifact.card.config["shard"]), artifact)
