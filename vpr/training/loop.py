"""What training the teacher and the student share: schedule, validation, and the loop.

Batches, views and dropout depend on the seed and the step alone, and a checkpoint is written after
every epoch, so a run that was killed goes on to the same result.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vpr.artifacts.store import config_to_json
from vpr.common.distributed import all_gather_cat, full_state_dict, rank_and_world, shard, trainer_options
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.data.loaders import EpochSampler, Normalise
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import l2_normalize, score_split
from vpr.training.callbacks import (
    MONITOR,
    AtomicCheckpoint,
    BestWeights,
    EpochLogger,
    RestoreSamplerEpoch,
    TrainingTimer,
)
from vpr.training.config import RunConfig
from vpr.training.ema import Ema
from vpr.training.loggers import open_logs

log = get_logger(__name__)

# Lightning's notices (devices, tips, adverts) hide the few lines that matter here.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

_CHECKED = 10  # batches between looks at the loss


def training_values(config: Any) -> dict[str, Any]:
    """What decides a training's result, as JSON values: its configuration, and the processes that share a step."""
    values = config_to_json(config)
    values.pop("dry_run")
    if rank_and_world()[1] > 1:  # the batch of a step is that of all processes
        values["processes"] = rank_and_world()[1]
    return values


def training_and_validation(catalog: Catalog, named: str) -> tuple[Catalog, Catalog]:
    """The splits to train on and to choose the epoch by; :class:`UserError` where one is missing or has no queries."""
    training, validation = catalog.select(split="train"), catalog.select(split="validation")
    if not len(training) or not len(validation):
        raise UserError(f"{named}: needs a train and a validation split: build it with --validation 0.1")
    score_split(validation, np.ones((len(validation), 1), np.float32))  # refuses what no epoch could be chosen by
    return training, validation


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on a learning rate: linear over ``warmup`` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def decay_groups(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups of the parameters that train: no weight decay on biases, norms and other vectors."""
    training = [p for p in parameters if p.requires_grad]
    # By axes longer than 1: class tokens of shape (1, 1, dim) are vectors too.
    matrices = [p for p in training if sum(side > 1 for side in p.shape) > 1]
    vectors = [p for p in training if sum(side > 1 for side in p.shape) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [{**group, "lr": lr} for group in groups if group["params"]]


class RecallModule(L.LightningModule):
    """A module that is validated by recall on products that no stage trains on.

    Args:
        preprocess: of the images.
        validation: what is scored.
        sharded: the child modules that FSDP spreads.
    """

    def __init__(self, preprocess: Preprocess, validation: Catalog, sharded: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.normalise = Normalise(preprocess)
        self._validation = validation
        self._found: list[tuple[Tensor, Tensor]] = []
        self._sharded = sharded

    def embed(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) preprocessed to (batch, dim) of unit length."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Spread the weights over the processes under FSDP; Lightning may call this again."""
        if self.device_mesh is not None and self._sharded:
            for name in self._sharded:
                shard(getattr(self, name), self.device_mesh["data_parallel"])
            self._sharded = ()

    def seed_step(self, seed: int, epoch: int, step: int) -> None:
        """Make dropout a function of seed, epoch, step and process, so that a resumed run draws the same."""
        values = [seed, epoch, step, rank_and_world()[0]]
        torch.manual_seed(int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0]))

    def of_step(self, loss: Tensor, number: int) -> Tensor:
        """A batch's loss as its optimiser step takes it; a loss that is not finite stops the training.

        Lightning divides by the batches accumulated; an epoch's last step may have fewer, whose mean it shall be too.
        """
        accumulate, batches = self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches)
        if number % _CHECKED == 0 and not torch.isfinite(loss):  # now and then: looking waits for the GPU
            raise UserError(f"training: the loss is not finite at step {self.global_step}: lower the learning rate")
        rest = batches % accumulate
        return loss * (accumulate / rest) if rest and number >= batches - rest else loss

    def scheduled(self, optimizer: torch.optim.Optimizer, warmup: float) -> dict[str, Any]:
        """An optimiser with one warm-up, a share of the training, and cosine, as Lightning takes it."""
        steps = int(self.trainer.estimated_stepping_batches)
        rising = max(1, int(warmup * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, rising))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Collect the embeddings of a batch."""
        self._found.append((batch["rows"], self.embed(self.normalise(batch["pixels"])).float()))

    def on_validation_epoch_end(self) -> None:
        """Score what all processes collected."""
        rows, found = (torch.cat(parts) for parts in zip(*self._found, strict=True))
        self._found = []
        rows, found = all_gather_cat(rows), all_gather_cat(found)
        vectors = np.zeros((len(self._validation), found.shape[1]), dtype=np.float32)
        vectors[rows.cpu().numpy()] = found.cpu().numpy()
        scores = score_split(self._validation, l2_normalize(vectors))
        self.log_dict({MONITOR: scores.recall_at_1, "val_recall_at_5": scores.recall_at_5, "val_map": scores.map})


@dataclass(frozen=True)
class FitResult:
    """What a training came to.

    Attributes:
        best: best validation recall@1.
        epoch: that reached it, from 1.
        steps: of the optimiser.
        seconds: of all the times it was started.
        last: weights of the whole module after the last epoch (their moving average, if there is one).
    """

    best: float
    epoch: int
    steps: int
    seconds: float
    last: dict[str, Tensor]


def fit(
    module: RecallModule,
    loaders: tuple[DataLoader[dict[str, Tensor]], DataLoader[dict[str, Tensor]]],
    kept: nn.Module,
    folder: Path,
    epochs: int,
    run: RunConfig,
) -> FitResult:
    """Train with Lightning, resuming from the folder's checkpoint if there is one.

    A training whose checkpoint is of its last epoch only takes its weights from it.

    Args:
        module: losses and optimiser.
        loaders: training batches, drawn by an :class:`~vpr.data.loaders.EpochSampler`, and validation batches.
        kept: the part of ``module`` whose best weights are written to ``best.safetensors``.
        folder: logs, checkpoint and best weights.
        epochs: total.
        run: how it is carried out.
    """
    best, clock = BestWeights(kept, folder / "best.safetensors"), TrainingTimer()
    ema = Ema(run.ema) if run.ema else None
    sampler = loaders[0].sampler
    assert isinstance(sampler, EpochSampler)
    # `best` comes before the average is taken out again, the checkpoint last of all (Lightning sees to that).
    trainer = _trainer(folder, epochs, run, [best, *([ema] if ema else []), clock, RestoreSamplerEpoch(sampler)])
    last = folder / "last.ckpt"
    if last.is_file():
        log.info(f"  resuming from the checkpoint in {folder}")
    trainer.fit(module, *loaders, ckpt_path=last if last.is_file() else None, weights_only=True)
    if epochs % run.validate_every:
        trainer.validate(module, loaders[1], verbose=False)
    state = ema.averaged("") if ema else full_state_dict(module)
    return FitResult(best.best, best.epoch, int(trainer.global_step), round(clock.seconds, 1), state)


def _trainer(folder: Path, epochs: int, run: RunConfig, callbacks: list[Callback]) -> L.Trainer:
    interactive = os.isatty(2)
    checkpoint = ModelCheckpoint(
        folder, filename="last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    return L.Trainer(
        accelerator="auto",
        precision=run.precision if run.precision != "auto" else best_precision(),
        max_epochs=epochs,
        check_val_every_n_epoch=run.validate_every,
        logger=open_logs(folder, run.tracker),
        callbacks=[*callbacks, TQDMProgressBar() if interactive else EpochLogger(), checkpoint],
        enable_progress_bar=interactive,
        enable_model_summary=False,
        gradient_clip_val=run.clip or None,
        accumulate_grad_batches=run.accumulate,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpoint()],
        **trainer_options(run.strategy),
    )


def best_precision() -> Literal["32-true", "bf16-mixed"]:
    """bf16 where the processor multiplies it in hardware (slower than float32 elsewhere)."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"
