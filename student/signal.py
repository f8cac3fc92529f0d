"""The teacher's signal: its embeddings of seeded views, computed once and kept as an artifact."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vpr.artifact import Artifact, find_current, load_artifact, write_artifact
from vpr.catalog import Catalog
from vpr.console import say
from vpr.errors import UserError
from vpr.loading import LoaderConfig, Normalise, PictureDataset, validation_loader
from vpr.training import best_precision, run_folder
from vpr.views import ViewConfig, apply_views, draw_views


@dataclass(frozen=True)
class Signal:
    """Cached teacher embeddings.

    Attributes:
        views: one (pictures, dim) float16 array per view, memory-mapped, L2-normalised.
        artifact: where they are.
    """

    views: list[NDArray[np.float16]]
    artifact: Artifact

    def lookup(self, rows: Tensor, view: int) -> Tensor:
        """(batch,) rows and the number of a view to (batch, dim) float32."""
        return torch.from_numpy(self.views[view][rows.numpy()].astype(np.float32))

    def bank(self, size: int, seed: int) -> Tensor:
        """A seeded draw of at most ``size`` pictures, each in a random view: (size, dim) float32."""
        rng = np.random.default_rng(seed)
        pictures = rng.permutation(len(self.views[0]))[:size]
        chosen = rng.integers(0, len(self.views), len(pictures))
        out = np.empty((len(pictures), self.views[0].shape[1]), dtype=np.float32)
        for view in np.unique(chosen):
            out[chosen == view] = self.views[view][pictures[chosen == view]]
        return torch.from_numpy(out)


def cache_signal(
    path: str, teacher: nn.Module, artifact: Artifact, catalog: Catalog, views: ViewConfig, count: int, seed: int
) -> Signal:
    """Embed ``count`` seeded views of every picture with the teacher, or load them if that was done.

    Every finished view is kept when the process is killed, and not computed again.

    Args:
        path: where the artifact is written.
        teacher: the network.
        artifact: the teacher's.
        catalog: the training pictures.
        views: augmentation.
        count: views per picture.
        seed: of the views.

    Raises:
        UserError: the teacher's card lacks preprocessing or embedding.
    """
    preprocess, embedding = artifact.card.preprocess, artifact.card.embedding
    if preprocess is None or embedding is None:
        raise UserError(f"{artifact.path}: its card has no preprocessing or embedding: train the teacher again")
    config = {"views": asdict(views), "count": count, "seed": seed, "pictures": _ordered_sha256(catalog)}
    parents = [artifact.as_parent("teacher")]
    if find_current(path, "views", config, parents):
        say(f"{path}: up to date")
        return _load(path)
    say(
        f"views: {count} of each of {len(catalog)} pictures, {embedding.dim} dimensions, "
        f"{2 * count * len(catalog) * embedding.dim / 1e6:.1f} MB"
    )
    folder = run_folder(path, config, parents)
    folder.mkdir(parents=True, exist_ok=True)
    loader: DataLoader[dict[str, Tensor]] | None = None
    for view in range(count):
        if (folder / _name(view)).is_file():
            continue
        if loader is None:
            loader = validation_loader(PictureDataset(catalog, preprocess, keep_in_memory=True), LoaderConfig(256))
        vectors = _embed_view(teacher, Normalise(preprocess), loader, views, view, seed)
        partial = folder / "partial.npy"
        np.save(partial, vectors, allow_pickle=False)
        os.replace(partial, folder / _name(view))
    with write_artifact(path, "views", config, parents) as draft:
        for view in range(count):
            shutil.copyfile(folder / _name(view), draft.path / _name(view))
        draft.preprocess, draft.embedding, draft.catalog = preprocess, embedding, catalog.summary()
    shutil.rmtree(folder)
    return _load(path)


def _embed_view(
    teacher: nn.Module,
    normalise: Normalise,
    loader: DataLoader[dict[str, Tensor]],
    views: ViewConfig,
    view: int,
    seed: int,
) -> NDArray[np.float16]:
    device = next(teacher.parameters()).device
    teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    half = best_precision() == "bf16-mixed"
    parts = []
    for batch in loader:
        parameters = draw_views(views, seed, batch["rows"], torch.full_like(batch["rows"], view))
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            pixels = apply_views(batch["pixels"].to(device), parameters)
            parts.append(teacher(normalise.to(device)(pixels)).float().cpu().numpy().astype(np.float16))
    return np.concatenate(parts)


def _ordered_sha256(catalog: Catalog) -> str:
    """Checksum of the pictures in their order: cached rows are looked up by position."""
    columns = (catalog.table[name].to_pylist() for name in ("image", "sha256", "box"))
    return hashlib.sha256(repr(list(zip(*columns, strict=True))).encode()).hexdigest()


def _name(view: int) -> str:
    return f"view-{view:04d}.npy"


def _load(path: str) -> Signal:
    artifact = load_artifact(path, "views")
    files = [artifact.file(name) for name in sorted(artifact.card.files)]
    return Signal([np.load(file, mmap_mode="r", allow_pickle=False) for file in files], artifact)
