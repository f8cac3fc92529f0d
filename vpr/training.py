"""What training the teacher and the student share: pictures, order, schedule, checkpoints, logs.

Batches depend on ``(seed, epoch)`` alone, and a checkpoint is written after every epoch, so a run
that was killed goes on to the same result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from vpr.artifact import Parent
from vpr.catalog import Catalog
from vpr.console import say
from vpr.embeddings import read_pixels, unit
from vpr.errors import UserError
from vpr.images import Preprocess
from vpr.metrics import RetrievalScores, evaluate

# Lightning's notices (devices, tips, adverts) hide the few lines that matter here.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
MONITOR = "val_recall_at_1"


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


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on a learning rate: linear over ``warmup`` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def decay_groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups of a module: no weight decay on biases, norms and other vectors."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [{**group, "lr": lr} for group in groups if group["params"]]


def score_split(catalog: Catalog, vectors: np.ndarray[Any, np.dtype[np.float32]]) -> RetrievalScores:
    """Recall of query pictures against gallery pictures of one split, whose vectors are given in order."""
    query, gallery = catalog.roles == "query", catalog.roles == "gallery"
    return evaluate(vectors[query], catalog.products[query], vectors[gallery], catalog.products[gallery])


class RecallModule(L.LightningModule):
    """A module that is validated by recall on products that no stage trains on."""

    def __init__(self, preprocess: Preprocess, validation: Catalog) -> None:
        super().__init__()
        self.normalise = Normalise(preprocess)
        self._validation = validation
        self._vectors: list[Tensor] = []

    def embed(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) preprocessed to (batch, dim) of unit length."""
        raise NotImplementedError

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Collect the embeddings of a batch."""
        self._vectors.append(self.embed(self.normalise(batch["pixels"])).float().cpu())

    def on_validation_epoch_end(self) -> None:
        """Score what was collected."""
        vectors, self._vectors = torch.cat(self._vectors).numpy(), []
        if len(vectors) != len(self._validation):  # Lightning's sanity check sees a few batches only
            return
        scores = score_split(self._validation, unit(vectors))
        self.log_dict({MONITOR: scores.recall_at_1, "val_recall_at_5": scores.recall_at_5, "val_map": scores.map})


class BestWeights(Callback):
    """Keeps the weights of the epoch with the best validation recall@1 as safetensors.

    Args:
        module: what to keep of the Lightning module.
        path: file, replaced atomically.
    """

    def __init__(self, module: nn.Module, path: Path) -> None:
        self.module = module
        self.path = path
        self.best = -1.0
        self.epoch = -1

    def on_validation_end(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """Compare and keep."""
        recall = float(trainer.callback_metrics.get(MONITOR, -1.0))
        if trainer.sanity_checking or recall <= self.best:
            return
        self.best, self.epoch = recall, trainer.current_epoch + 1
        partial = self.path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in self.module.state_dict().items()}, partial)
        os.replace(partial, self.path)

    def state_dict(self) -> dict[str, Any]:
        """Kept in the checkpoint, so that a resumed run remembers its best."""
        return {"best": self.best, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        self.best, self.epoch = state_dict["best"], state_dict["epoch"]


class EpochLine(Callback):
    """Prints one line after each validation, for logs that are not terminals."""

    def on_validation_end(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """Print losses and recall by name."""
        if trainer.sanity_checking:
            return
        shown = {k: v for k, v in trainer.callback_metrics.items() if not k.endswith(("_step", "_at_5", "map"))}
        text = "  ".join(f"{name} {float(value):.3f}" for name, value in shown.items())
        say(f"  epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {text}")


def run_folder(output: str, config: dict[str, Any], parents: list[Parent]) -> Path:
    """Folder of a run's logs and checkpoint, beside its output and named after what it computes.

    Another configuration has another folder, so a run never resumes from a stranger's checkpoint.
    """
    identity = json.dumps([config, [p.model_dump() for p in parents]], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Path(output).parent / f"{Path(output).name}.run-{digest}"


def fit(
    module: RecallModule,
    loaders: tuple[DataLoader[dict[str, Tensor]], DataLoader[dict[str, Tensor]]],
    kept: nn.Module,
    folder: Path,
    epochs: int,
    validate_every: int,
    precision: Precision,
) -> BestWeights:
    """Train with Lightning, resuming from the folder's checkpoint if there is one.

    Args:
        module: losses and optimiser.
        loaders: training and validation batches.
        kept: the part of ``module`` whose best weights are kept.
        folder: logs, checkpoint and best weights.
        epochs: total.
        validate_every: epochs between validations.
        precision: of the arithmetic.

    Returns:
        the callback that holds the best recall and the path of its weights.
    """
    best = BestWeights(kept, folder / "best.safetensors")
    checkpoint = ModelCheckpoint(folder, filename="last", save_top_k=1, enable_version_counter=False)
    interactive = os.isatty(2)
    logs: list[Logger] = [
        CSVLogger(folder, name="", version=f"csv-{len(_csv_logs(folder))}"),
        TensorBoardLogger(folder, name="", version="tb"),
    ]
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision=precision if precision != "auto" else best_precision(),
        max_epochs=epochs,
        check_val_every_n_epoch=validate_every,
        logger=logs,
        callbacks=[best, checkpoint, TQDMProgressBar() if interactive else EpochLine()],
        enable_progress_bar=interactive,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    last = folder / "last.ckpt"
    if last.is_file():
        say(f"  resuming from the checkpoint in {folder}")
    trainer.fit(module, *loaders, ckpt_path=last if last.is_file() else None, weights_only=True)
    if best.epoch < 0:
        raise UserError(f"validate_every: {validate_every} is more than the {epochs} epochs: lower it")
    return best


def finish_run(folder: Path, destination: Path) -> None:
    """Put the best weights and the CSV logs (one for each time the run was started) into an artifact."""
    shutil.copyfile(folder / "best.safetensors", destination / "model.safetensors")
    for number, log in enumerate(_csv_logs(folder)):
        shutil.copyfile(log, destination / (f"metrics-resumed-{number}.csv" if number else "metrics.csv"))


def drop_checkpoint(folder: Path) -> None:
    """Remove a finished run's checkpoint and weights, which its artifact holds; its logs stay."""
    for name in ("last.ckpt", "best.safetensors"):
        (folder / name).unlink(missing_ok=True)


def best_precision() -> Literal["32-true", "bf16-mixed"]:
    """bf16 where the processor multiplies it in hardware (slower than float32 elsewhere)."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def _csv_logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("csv-*/metrics.csv"))


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
