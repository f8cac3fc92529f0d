"""What is kept while a training runs: its checkpoint, its best weights, its time; and the line of each epoch."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import save_file
from torch import nn

from vpr.common.distributed import full_state_dict, is_first
from vpr.common.log import get_logger
from vpr.data.loaders import EpochSampler

log = get_logger(__name__)

MONITOR = "val_recall_at_1"  # what epochs are compared by


class AtomicCheckpoint(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a kill leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Lightning's own goes through the system's temporary folder, which may be another file system."""
        partial = Path(path).with_suffix(".partial")
        with partial.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)


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
        if recall <= self.best:
            return
        assert trainer.max_epochs is not None
        self.best, self.epoch = recall, min(trainer.current_epoch + 1, trainer.max_epochs)
        weights = full_state_dict(self.module)
        if is_first():
            # A folder, since safetensors writes to a hidden file beside the one that it is given.
            new = self.path.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            save_file(weights, new / self.path.name)
            with (new / self.path.name).open("rb") as stream:
                os.fsync(stream.fileno())  # the checkpoint that names it best may outlive it otherwise
            os.replace(new / self.path.name, self.path)
            new.rmdir()

    def state_dict(self) -> dict[str, Any]:
        """Kept in the checkpoint, so that a resumed run remembers its best."""
        return {"best": self.best, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        self.best, self.epoch = state_dict["best"], state_dict["epoch"]


class TrainingTimer(Callback):
    """Seconds spent, over all the times that a run was started (each up to its last checkpoint)."""

    def __init__(self) -> None:
        self.before = 0.0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Until now."""
        return self.before + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        """Kept in the checkpoint."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        self.before = state_dict["seconds"]


class EpochLogger(Callback):
    """Prints one line of each epoch, for logs that are not terminals."""

    def __init__(self) -> None:
        self.validated = False

    def on_validation_end(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """Remember that this epoch has a recall of its own; print that of the last weights, which comes after."""
        self.validated = trainer.state.fn == TrainerFn.FITTING
        if not self.validated:
            log.info(f"  the last weights  {MONITOR} {float(trainer.callback_metrics[MONITOR]):.3f}")

    def on_train_epoch_end(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """Print mean losses and, after a validation, recall."""
        hidden = ("_step", "_epoch", "_at_5", "map") + (() if self.validated else (MONITOR,))
        shown = {k: v for k, v in trainer.callback_metrics.items() if not k.endswith(hidden)}
        text = "  ".join(f"{name} {float(value):.3f}" for name, value in sorted(shown.items()))
        log.info(f"  epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {text}")
        self.validated = False


class RestoreSamplerEpoch(Callback):
    """Gives the first epoch after a resume its own order: Lightning starts the loader before it names the epoch.

    Workers read the order ahead as soon as they are started, and would read that of epoch 0.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the epoch that comes next."""
        self._sampler.set_epoch(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def drop_checkpoints(folder: Path) -> None:
    """Remove a finished run's checkpoints and weights, which its artifact holds, and what a kill has left.

    Its logs stay. Of several processes the first does it.
    """
    if not is_first():
        return
    for name in ("last.ckpt", "best.safetensors", "last.partial", ".lock"):
        for path in folder.rglob(name):
            path.unlink(missing_ok=True)
    for path in folder.rglob("best.new"):
        shutil.rmtree(path)
