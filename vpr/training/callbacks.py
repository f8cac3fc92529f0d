"""Lightning callbacks: best weights, training time, epoch log and a resumable sampler; atomic checkpoints."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import save_file
from torch import Tensor, nn

from vpr.common.distributed import full_state_dict, is_first
from vpr.common.log import get_logger
from vpr.data.loaders import EpochSampler
from vpr.data.pixel_cache import PATTERN

log = get_logger(__name__)

Weights = dict[str, Tensor]

MONITOR = "val_recall_at_1"  # metric that selects the best epoch
_LOG_LABELS = {MONITOR: "recall@1"}


class AtomicCheckpoint(TorchCheckpointIO):
    """Write a checkpoint next to its target and rename it, so that a kill leaves the previous one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint in its folder; Lightning's version uses a temporary folder on another file system."""
        partial = Path(path).with_suffix(".partial")
        with partial.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)


class BestWeights(Callback):
    """Write the weights of a module's best epoch by validation recall@1 as safetensors, replaced atomically.

    ``convert`` changes names and values before they are written. After ``patience`` validations in a row without a
    higher recall the training ends; 0 lets it go on.
    """

    state_key = "best_weights"

    def __init__(self, module: nn.Module, path: Path, convert: Callable[[Weights], Weights], patience: int = 0) -> None:
        self.module = module
        self.convert = convert
        self.path = path
        self.patience = patience
        self.best = -1.0
        self.epoch = -1
        self.stale = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether the recall has not risen for as many validations as the patience allows."""
        return 0 < self.patience <= self.stale

    def on_train_start(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """End a resumed training that had ended early."""
        trainer.should_stop = trainer.should_stop or self.is_exhausted

    def on_validation_end(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """Write the weights if the recall is the best so far."""
        recall = float(trainer.callback_metrics.get(MONITOR, -1.0))
        if recall <= self.best:
            self.stale += 1
            if self.is_exhausted and not trainer.should_stop and trainer.state.fn == TrainerFn.FITTING:
                trainer.should_stop = True
                log.info(f"  no higher recall@1 in {self.stale} validations: the training ends")
            return
        assert trainer.max_epochs is not None
        self.best, self.epoch, self.stale = recall, min(trainer.current_epoch + 1, trainer.max_epochs), 0
        weights = full_state_dict(self.module)
        if is_first():
            # safetensors writes to a hidden file next to its target, hence the folder.
            new = self.path.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            save_file(self.convert(weights), new / self.path.name)
            with (new / self.path.name).open("rb") as stream:
                os.fsync(stream.fileno())  # else a power failure could keep the checkpoint but lose these weights
            os.replace(new / self.path.name, self.path)
            new.rmdir()

    def state_dict(self) -> dict[str, Any]:
        """Return the best recall, its epoch and the validations since then for the checkpoint."""
        return {"best": self.best, "epoch": self.epoch, "stale": self.stale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best recall, its epoch and the validations since then from a checkpoint."""
        self.best, self.epoch = state_dict["best"], state_dict["epoch"]
        self.stale = state_dict.get("stale", 0)  # checkpoints of earlier versions have none


class TrainingTimer(Callback):
    """Measure training time, summed over all starts (each up to its last checkpoint)."""

    state_key = "training_timer"

    def __init__(self) -> None:
        self.before = 0.0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training until now."""
        return self.before + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        """Return the training time for the checkpoint."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the training time of earlier starts from a checkpoint."""
        self.before = state_dict["seconds"]


class EpochLogger(Callback):
    """Log one line per epoch, for output that is not a terminal."""

    def __init__(self) -> None:
        self.is_validated = False

    def on_validation_end(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """Note that the epoch has a recall; log the recall of a validation after training."""
        self.is_validated = trainer.state.fn == TrainerFn.FITTING
        if not self.is_validated:
            log.info(f"  last weights  {_LOG_LABELS[MONITOR]} {float(trainer.callback_metrics[MONITOR]):.3f}")

    def on_train_epoch_end(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """Log mean losses and, after a validation, recall@1."""
        hidden = ("_step", "_at_5", "map") + (() if self.is_validated else (MONITOR,))
        shown = {k.removesuffix("_epoch"): v for k, v in trainer.callback_metrics.items() if not k.endswith(hidden)}
        metrics = {name: float(value) for name, value in sorted(shown.items())}
        columns = "  ".join(f"{_LOG_LABELS.get(name, name)} {value:.3f}" for name, value in metrics.items())
        log.info(f"  epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {columns}")
        self.is_validated = False


class RestoreSamplerEpoch(Callback):
    """Set the sampler's epoch on resume, because Lightning starts the loader before it sets the epoch.

    Workers prefetch the order as soon as they start; without this they would read the order of epoch 0.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the sampler to the first epoch after the checkpoint."""
        self._sampler.set_epoch(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def drop_checkpoints(folder: Path) -> None:
    """Remove checkpoints, weights, cached images and leftovers of a finished training run; its logs stay.

    The artifact holds the weights. With several processes, only the first removes files.
    """
    if not is_first():
        return
    for name in ("last.ckpt", "best.safetensors", "last.partial", ".lock"):
        for path in folder.rglob(name):
            path.unlink(missing_ok=True)
    for path in folder.rglob(PATTERN):
        path.unlink(missing_ok=True)
    for path in folder.rglob("best.new"):
        shutil.rmtree(path)
