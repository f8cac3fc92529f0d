"""What training the teacher and the student share: schedule, validation, checkpoints, logs.

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
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vpr.artifact import Parent
from vpr.catalog import Catalog
from vpr.console import say
from vpr.embeddings import unit
from vpr.errors import UserError
from vpr.images import Preprocess
from vpr.loading import Normalise
from vpr.metrics import RetrievalScores, evaluate

# Lightning's notices (devices, tips, adverts) hide the few lines that matter here.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
MONITOR = "val_recall_at_1"


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
