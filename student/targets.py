"""What a batch's student is compared with: looked up in the cache, or computed by the teacher beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student.config import TargetsConfig
from student.dimension import project
from student.teacher_cache import TeacherCache, embed_pixels
from vpr.common.distributed import all_gather_cat
from vpr.data.catalog import Catalog
from vpr.data.loaders import ImageDataset, Normalise
from vpr.imaging.augment import apply_views
from vpr.imaging.preprocess import Preprocess


class CachedTargets(nn.Module):
    """Embeddings from the cache, and a bank that is drawn from it anew in each epoch.

    Args:
        signal: the cache.
        config: number of views and size of the bank.
        projection: (D, d) from the teacher's dimension, or None.
        seed: of the bank.
    """

    projection: Tensor | None
    bank: Tensor

    def __init__(self, signal: TeacherCache, config: TargetsConfig, projection: Tensor | None, seed: int) -> None:
        super().__init__()
        self.signal, self.config, self.seed = signal, config, seed
        self.register_buffer("projection", projection, persistent=False)
        self.register_buffer("bank", torch.empty(0), persistent=False)

    def view(self, epoch: int) -> int:
        """The view that every image of an epoch is seen in."""
        return epoch % self.config.views

    def start_epoch(self, epoch: int, device: torch.device) -> None:
        """Draw the epoch's bank, by seed and epoch alone."""
        drawn = self.signal.draw(self.config.bank, self.seed * 1_000_003 + epoch)
        self.bank = self._short(torch.from_numpy(drawn).to(device))

    def of(self, batch: dict[str, Tensor], parameters: Tensor, epoch: int, mix: Mixup | None) -> tuple[Tensor, Tensor]:
        """(batch, d) embeddings of the views, and the bank."""
        found = torch.from_numpy(self.signal.lookup(batch["rows"].cpu().numpy(), self.view(epoch)))
        return self._short(F.normalize(found.to(self.bank.device), dim=1)), self.bank

    def _short(self, vectors: Tensor) -> Tensor:
        return vectors if self.projection is None else project(vectors, self.projection)


class OnlineTargets(nn.Module):
    """The teacher run on the very views of each step, and a queue of its latest embeddings.

    Args:
        teacher: in evaluation mode; it is no part of what trains or is checkpointed.
        preprocess: the teacher's.
        config: size of the queue.
        dim: of the embeddings as the student sees them.
        projection: (D, d) from the teacher's dimension, or None.
    """

    projection: Tensor | None
    queue: Tensor
    filled: Tensor

    def __init__(
        self, teacher: nn.Module, preprocess: Preprocess, config: TargetsConfig, dim: int, projection: Tensor | None
    ) -> None:
        super().__init__()
        self._teacher = [teacher]  # hidden in a list from checkpoints and DDP
        self.normalise = Normalise(preprocess)
        self.register_buffer("projection", projection, persistent=False)
        self.register_buffer("queue", torch.zeros(config.bank, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def view(self, epoch: int) -> int:
        """Views never come twice."""
        return epoch

    def start_epoch(self, epoch: int, device: torch.device) -> None:
        """Bring the teacher to the student's device."""
        self._teacher[0].to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def of(self, batch: dict[str, Tensor], parameters: Tensor, epoch: int, mix: Mixup | None) -> tuple[Tensor, Tensor]:
        """(batch, d) embeddings of the views, and the bank: these and the ones before them."""
        pixels = apply_views(batch.get("teacher_pixels", batch["pixels"]), parameters)
        found = embed_pixels(self._teacher[0], self.normalise, pixels if mix is None else mix(pixels)).clone()
        found = F.normalize(found if self.projection is None else found @ self.projection, dim=1)
        self._enqueue(all_gather_cat(found))
        return found, self.queue[: int(self.filled)]

    def _enqueue(self, vectors: Tensor) -> None:
        """The latest first; the oldest fall out."""
        self.queue = torch.cat([vectors, self.queue])[: len(self.queue)]
        self.filled = torch.clamp(self.filled + len(vectors), max=len(self.queue))


class Mixup:
    """Each image mixed with another of its batch: share * x + (1 - share) * x[partner].

    Args:
        a: of the Beta(a, a) that the batch's share is drawn from.
        batch: number of images.
    """

    def __init__(self, a: float, batch: int) -> None:
        gamma = torch._standard_gamma(torch.full((2,), a))  # a Beta is a ratio of Gammas; drawn from torch's generator
        self.share = float(gamma[0] / gamma.sum())
        self.partner = torch.randperm(batch)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(batch, 3, size, size) float to the same."""
        return self.share * pixels + (1 - self.share) * pixels[self.partner.to(pixels.device)]


class TwoSizeDataset(ImageDataset):
    """Images in the student's size and, where it differs, in the teacher's too.

    Args:
        catalog: n images.
        student: its preprocessing.
        teacher: its preprocessing.
        keep_in_memory: decode all of them now.
    """

    def __init__(
        self, catalog: Catalog, student: Preprocess, teacher: Preprocess, keep_in_memory: bool = False
    ) -> None:
        super().__init__(catalog, student, keep_in_memory)
        self.of_teacher = ImageDataset(catalog, teacher, keep_in_memory) if teacher.size != student.size else None

    def __getitems__(self, rows: list[int]) -> dict[str, Any]:
        """A batch with ``teacher_pixels`` where the sizes differ."""
        batch = super().__getitems__(rows)
        if self.of_teacher is not None:
            batch["teacher_pixels"] = self.of_teacher.__getitems__(rows)["pixels"]
        return batch
