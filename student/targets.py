"""Teacher embeddings that the student is compared with: read from the cache, or computed in each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student.config import TargetsConfig
from student.teacher_cache import TeacherCache, embed_pixels
from vpr.common.distributed import all_gather_cat
from vpr.common.transfer import to_device
from vpr.data.catalog import Catalog
from vpr.data.loaders import ImageDataset, Normalise
from vpr.data.pixel_cache import CacheSpace, PixelCache
from vpr.imaging.augment import apply_views
from vpr.imaging.config import ViewConfig
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.projection import project


class CachedTargets(nn.Module):
    """Embeddings from the cache, and a seeded bank sampled from it in each epoch.

    ``projection`` is a (D, d) projection from the teacher's width, or None.
    """

    projection: Tensor | None
    bank: Tensor

    def __init__(self, cache: TeacherCache, config: TargetsConfig, projection: Tensor | None, seed: int) -> None:
        super().__init__()
        self.cache, self.config, self.seed = cache, config, seed
        self.register_buffer("projection", projection, persistent=False)
        self.register_buffer("bank", torch.empty(0), persistent=False)

    def choose_view(self, epoch: int) -> int:
        """Return the view of all images in an epoch."""
        return epoch % self.config.views

    def start_epoch(self, epoch: int, device: torch.device) -> None:
        """Sample the bank of the epoch. It depends on seed and epoch only."""
        vectors = self.cache.sample(self.config.bank, self.seed * 1_000_003 + epoch)
        self.bank = self._project(torch.from_numpy(vectors).to(device))

    def targets_for(
        self, batch: dict[str, Tensor], parameters: Tensor, epoch: int, mixup: Mixup | None
    ) -> tuple[Tensor, Tensor]:
        """Return the (batch, d) embeddings of the views, and the (size, d) bank."""
        return self.embed_views(batch, parameters, epoch), self.bank

    def embed_views(
        self, batch: dict[str, Tensor], parameters: Tensor, epoch: int, mixup: Mixup | None = None
    ) -> Tensor:
        """Return the (batch, d) embeddings of the views."""
        vectors = torch.from_numpy(self.cache.lookup(batch["rows"].cpu().numpy(), self.choose_view(epoch)))
        return self._project(F.normalize(to_device(vectors, self.bank.device), dim=1))

    def _project(self, vectors: Tensor) -> Tensor:
        return vectors if self.projection is None else project(vectors, self.projection)


class OnlineTargets(nn.Module):
    """The teacher on the views of each step, and a queue of its latest embeddings.

    The teacher is neither trained nor stored in checkpoints. ``projection`` is (D, d), or None;
    ``dim`` is the width d of the targets.
    """

    projection: Tensor | None
    queue: Tensor
    filled: Tensor

    def __init__(
        self, teacher: nn.Module, preprocess: Preprocess, config: TargetsConfig, dim: int, projection: Tensor | None
    ) -> None:
        super().__init__()
        self._teacher = [teacher]  # The list hides it from checkpoints and DDP.
        self.normalise, self.image_size = Normalise(preprocess), preprocess.size
        self.register_buffer("projection", projection, persistent=False)
        self.register_buffer("queue", torch.zeros(config.bank, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))  # for checkpoints
        self._filled = 0  # the same number on the CPU

    def choose_view(self, epoch: int) -> int:
        """Return a new view for every epoch."""
        return epoch

    def start_epoch(self, epoch: int, device: torch.device) -> None:
        """Move the teacher to the student's device, and read the size of a queue from a checkpoint."""
        self._filled = int(self.filled)
        self._teacher[0].to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def targets_for(
        self, batch: dict[str, Tensor], parameters: Tensor, epoch: int, mixup: Mixup | None
    ) -> tuple[Tensor, Tensor]:
        """Return the (batch, d) embeddings of the views, and the bank: these and earlier ones."""
        vectors = self.embed_views(batch, parameters, epoch, mixup)
        self._enqueue(all_gather_cat(vectors))
        return vectors, self.queue[: self._filled]

    def embed_views(
        self, batch: dict[str, Tensor], parameters: Tensor, epoch: int, mixup: Mixup | None = None
    ) -> Tensor:
        """Return the (batch, d) embeddings of the views; the bank stays as it is."""
        pixels = apply_views(batch.get("teacher_pixels", batch["pixels"]), parameters, self.image_size)
        vectors = embed_pixels(self._teacher[0], self.normalise, pixels if mixup is None else mixup(pixels)).clone()
        return F.normalize(vectors, dim=1) if self.projection is None else project(vectors, self.projection)

    def _enqueue(self, vectors: Tensor) -> None:
        """Put vectors at the front of the queue and drop the oldest."""
        self.queue = torch.cat([vectors, self.queue])[: len(self.queue)]
        self._filled = min(self._filled + len(vectors), len(self.queue))
        self.filled.fill_(self._filled)


Targets = CachedTargets | OnlineTargets


class Mixup:
    """Mix each image with another of its batch: share * x + (1 - share) * x[partner], share from Beta(alpha, alpha)."""

    def __init__(self, alpha: float, batch_size: int) -> None:
        # A Beta is a ratio of Gammas. Gammas come from torch's seeded generator.
        gamma = torch._standard_gamma(torch.full((2,), alpha))
        self.share = float(gamma[0] / gamma.sum())
        self.partner = torch.randperm(batch_size)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map (batch, 3, size, size) float pixels to the same shape."""
        return self.share * pixels + (1 - self.share) * pixels[to_device(self.partner, pixels.device)]


class TwoSizeDataset(ImageDataset):
    """Images for ``views`` in the student's size and, if it differs, in the teacher's size too."""

    def __init__(
        self,
        catalog: Catalog,
        student: Preprocess,
        teacher: Preprocess,
        keep_in_memory: bool = False,
        views: Sequence[ViewConfig] = (),
    ) -> None:
        super().__init__(catalog, student, keep_in_memory, views)
        is_same_size = teacher.size == student.size
        self.teacher_images = None if is_same_size else ImageDataset(catalog, teacher, keep_in_memory, views)

    def use_cache(self, space: CacheSpace) -> None:
        """Store the images of both sizes on disk."""
        super().use_cache(space)
        if self.teacher_images is not None:
            self.teacher_images.use_cache(space)

    @property
    def caches(self) -> list[PixelCache]:
        """Caches on disk, of both sizes."""
        return super().caches + ([] if self.teacher_images is None else self.teacher_images.caches)

    def __getitems__(self, rows: list[int]) -> dict[str, Any]:
        """Return a batch, with ``teacher_pixels`` if the sizes differ."""
        batch = super().__getitems__(rows)
        if self.teacher_images is not None:
            batch["teacher_pixels"] = self.teacher_images.__getitems__(rows)["pixels"]
        return batch
