"""Training loop of teacher and student: schedule, validation and resuming.

Batches, views and dropout depend only on the seed and the step. A checkpoint is written after every epoch, so a
killed training run resumes to the same result.
"""

import logging
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vpr.artifacts.writer import config_to_json
from vpr.common.distributed import all_gather_cat, full_state_dict, rank_and_world, shard, trainer_options
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.common.transfer import to_device
from vpr.data.catalog import Catalog
from vpr.data.loaders import EpochSampler, Normalise
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import l2_normalize, score_split
from vpr.retrieval.self_search import find_self_search
from vpr.training.callbacks import (
    MONITOR,
    AtomicCheckpoint,
    BestWeights,
    EpochLogger,
    RestoreSamplerEpoch,
    TrainingTimer,
)
from vpr.training.compile import compile_network, reraise_compile_errors
from vpr.training.config import RunConfig
from vpr.training.ema import Ema
from vpr.training.loggers import open_logs

log = get_logger(__name__)

# Lightning's notices (devices, tips, adverts) would hide our log lines.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

_SYNC_INTERVAL = 10  # batches between readings of the loss, which wait for the GPU


def training_values(config: Any) -> dict[str, Any]:
    """Return the JSON values that determine the result: the configuration and the number of processes."""
    values = config_to_json(config)
    for key in ("dry_run", "require_licence"):
        values.pop(key)
    if rank_and_world()[1] > 1:  # a step's batch is the sum over processes
        values["processes"] = rank_and_world()[1]
    return values


def training_and_validation(catalog: Catalog, path: str) -> tuple[Catalog, Catalog]:
    """Return the train and validation splits; raise :class:`UserError` if one is missing or cannot be scored."""
    training, validation = catalog.select(split="train"), catalog.select(split="validation")
    if not len(training) or not len(validation):
        raise UserError(f"{path}: a train and a validation split are required. Build it with --validation 0.1.")
    for role in ("gallery", "query"):
        if role not in validation.roles:
            problem = f"its validation split has {len(validation)} images and none with the role {role}"
            raise UserError(f"{path}: {problem}. Set the roles of its images in its table.")
    score_split(validation, np.ones((len(validation), 1), np.float32))  # raises before training, not after an epoch
    if (own := find_self_search(validation)) is not None:
        skipped = f", {own.skipped} are the only ones of their product and do not search" if own.skipped else ""
        log.info(f"validation: its queries are its gallery, so each image searches the others{skipped}")
    return training, validation


def validation_values(catalog: Catalog) -> dict[str, str]:
    """Return what cards record of the validation: earlier versions let an image find itself where it is in both roles.

    It is empty for a validation split whose queries are not its gallery images.
    """
    return {"validation": "leave-one-out"} if find_self_search(catalog.select(split="validation")) else {}


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Return the learning-rate factor: linear over ``warmup`` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def decay_groups(
    parameters: list[nn.Parameter], lr: float, weight_decay: float, decay_vectors: bool = False
) -> list[dict[str, Any]]:
    """Return optimiser groups of the trainable parameters.

    Biases, norms and other vectors get no weight decay without ``decay_vectors``.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if decay_vectors:
        return [{"params": trainable, "weight_decay": weight_decay, "lr": lr}] if trainable else []
    # Count axes longer than 1, because class tokens of shape (1, 1, dim) are vectors too.
    matrices = [p for p in trainable if sum(side > 1 for side in p.shape) > 1]
    vectors = [p for p in trainable if sum(side > 1 for side in p.shape) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [{**group, "lr": lr} for group in groups if group["params"]]


class RecallModule(L.LightningModule):
    """Base module, validated by recall on products that no stage trains on.

    ``sharded`` names the child modules that FSDP shards.
    """

    def __init__(self, preprocess: Preprocess, validation: Catalog, sharded: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.normalise = Normalise(preprocess)
        self.image_size = preprocess.size  # of views and images, in pixels
        self._validation = validation
        self._val_embeddings: list[tuple[Tensor, Tensor]] = []
        self._sharded = sharded

    def embed(self, x: Tensor) -> Tensor:
        """Map preprocessed (batch, 3, size, size) to L2-normalised (batch, dim)."""
        raise NotImplementedError

    def plain_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of this module or of a part, under the names and shapes in which they are stored."""
        return state

    def configure_model(self) -> None:
        """Shard the weights under FSDP, once; Lightning may call this again."""
        if self.device_mesh is not None and self._sharded:
            is_bf16 = self.trainer.precision == "bf16-mixed"
            for name in self._sharded:
                shard(getattr(self, name), self.device_mesh["data_parallel"], is_bf16)
            self._sharded = ()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch to the device, except the rows: tables in memory are read by them."""
        others = {name: value for name, value in batch.items() if name != "rows"}
        return {"rows": batch["rows"], **super().transfer_batch_to_device(others, device, dataloader_idx)}

    def seed_step(self, seed: int, epoch: int, step: int) -> None:
        """Seed dropout from seed, epoch, step and rank, so that a resumed training run draws the same masks."""
        values = [seed, epoch, step, rank_and_world()[0]]
        torch.manual_seed(int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0]))

    def check_finite(self, loss: Tensor, batch_index: int) -> None:
        """Raise :class:`UserError` if the loss is not finite; checks every tenth batch."""
        if batch_index % _SYNC_INTERVAL == 0 and not torch.isfinite(loss):
            raise UserError(f"training: the loss is not finite at step {self.global_step}. Lower the learning rate.")

    def log_losses(self, losses: dict[str, Tensor], images: int) -> None:
        """Log losses of a step as this process has them, and their means over epoch, images and processes.

        Processes exchange the means once per epoch. In every step, the exchange would wait for the slowest process.
        """
        by_step = {f"{name}_step": loss for name, loss in losses.items()}
        self.log_dict(by_step, on_step=True, on_epoch=False, batch_size=images)
        means = {f"{name}_epoch": loss for name, loss in losses.items()}
        is_distributed = self.trainer.world_size > 1
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=images, sync_dist=is_distributed)

    def build_optimizer(
        self, kind: type[torch.optim.AdamW] | type[torch.optim.SGD], groups: list[dict[str, Any]], **options: Any
    ) -> torch.optim.Optimizer:
        """Return an optimiser of parameter groups that updates all weights in one kernel.

        With a scaler of gradients (``16-mixed``), a fused optimiser would undo the scale after the gradients are
        clipped. PyTorch can shard the fused AdamW on a GPU only, and no fused SGD.
        """
        device = self.trainer.strategy.root_device.type
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        is_shardable = self.device_mesh is None or (device == "cuda" and kind is torch.optim.AdamW)
        is_fused = device in ("cpu", "cuda") and is_shardable and not has_scaler
        return kind(groups, fused=is_fused or None, **options)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Clip the gradients. Lightning rejects fused optimisers under bf16 too, where there is no scale to undo."""
        algorithm = gradient_clip_algorithm or GradClipAlgorithmType.NORM
        Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def rescale_for_accumulation(self, loss: Tensor, batch_index: int) -> Tensor:
        """Return the loss scaled so that a short last accumulation window of an epoch is a mean too.

        Lightning always divides by ``accumulate_grad_batches``, also where fewer batches are left.
        """
        accumulate, batches = self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches)
        rest = batches % accumulate
        return loss * (accumulate / rest) if rest and batch_index >= batches - rest else loss

    def with_warmup_cosine(self, optimizer: torch.optim.Optimizer, warmup: float) -> dict[str, Any]:
        """Return Lightning's optimiser configuration; ``warmup`` is a share of all steps."""
        steps = int(self.trainer.estimated_stepping_batches)
        warmup_steps = max(1, int(warmup * steps))
        return self.with_schedule(optimizer, lambda step: warmup_cosine(step, steps, warmup_steps))

    def with_schedule(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> dict[str, Any]:
        """Return Lightning's optimiser configuration; ``factor`` maps a step to the factor of the learning rates."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Collect the embeddings of a batch."""
        self._val_embeddings.append((batch["rows"], self.embed(self.normalise(batch["pixels"])).float()))

    def on_validation_epoch_end(self) -> None:
        """Log the recall of the embeddings collected by all processes."""
        rows, embeddings = (torch.cat(parts) for parts in zip(*self._val_embeddings, strict=True))
        self._val_embeddings = []
        rows, embeddings = all_gather_cat(to_device(rows, embeddings.device)), all_gather_cat(embeddings)
        vectors = np.zeros((len(self._validation), embeddings.shape[1]), dtype=np.float32)
        vectors[rows.cpu().numpy()] = embeddings.cpu().numpy()
        scores = score_split(self._validation, l2_normalize(vectors))
        self.log_dict({MONITOR: scores.recall_at_1, "val_recall_at_5": scores.recall_at_5, "val_map": scores.map})


@dataclass(frozen=True)
class FitResult:
    """Best validation recall@1 and its epoch (from 1), optimiser steps, and seconds over all starts.

    ``last`` holds the weights of the Lightning module after the last epoch, or their moving average if there is one,
    as :meth:`RecallModule.plain_weights` returns them.
    """

    best: float
    epoch: int
    steps: int
    seconds: float
    last: dict[str, Tensor]


def fit(
    module: RecallModule,
    loaders: tuple[DataLoader[dict[str, Tensor]], DataLoader[dict[str, Tensor]]],
    best_part: nn.Module,
    folder: Path,
    epochs: int,
    run: RunConfig,
) -> FitResult:
    """Train with Lightning, resuming from the folder's checkpoint if there is one.

    If the checkpoint is that of the last epoch, only restore the weights.
    The training loader has an :class:`~vpr.data.loaders.EpochSampler`. The best weights of ``best_part`` are written to
    ``best.safetensors`` in the folder, next to logs and checkpoint.
    """
    best = BestWeights(best_part, folder / "best.safetensors", module.plain_weights, run.patience)
    timer = TrainingTimer()
    ema = Ema(run.ema) if run.ema else None
    sampler = loaders[0].sampler
    assert isinstance(sampler, EpochSampler)
    # `best` must run before `ema` swaps the average out again. Lightning runs checkpoint callbacks last.
    callbacks: list[Callback] = [best, *([ema] if ema else []), timer, RestoreSamplerEpoch(sampler)]
    trainer = _build_trainer(folder, epochs, run, callbacks)
    if run.strategy != "fsdp":  # FSDP2 shards contiguous weights only
        # As the images are laid out; else the libraries reorder the weights of each convolution in each step.
        module.to(memory_format=torch.channels_last)
    if run.compile:
        compile_network(best_part)
    last = folder / "last.ckpt"
    if last.is_file():
        log.info(f"  resuming from {last}")
    with reraise_compile_errors(), _reraise_single_values(), _fail_if_terminated():
        trainer.fit(module, *loaders, ckpt_path=last if last.is_file() else None, weights_only=True)
        if epochs % run.validate_every and not best.is_exhausted:
            trainer.validate(module, loaders[1], verbose=False)
    state = ema.state_dict()["shadow"] if ema else full_state_dict(module)
    plain = module.plain_weights({name: value.contiguous() for name, value in state.items()})
    return FitResult(best.best, best.epoch, int(trainer.global_step), round(timer.seconds, 1), plain)


@contextmanager
def _reraise_single_values() -> Iterator[None]:
    """Raise PyTorch's error of BatchNorm over a single value as :class:`UserError`.

    Only the forward pass knows the size of the last feature map of any network.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel when training"):
            raise
        problem = "the network's BatchNorm has no statistics of a single image of this size"
        raise UserError(f"loader.batch_size: {problem}. Set it to 2 or more, or use larger images.") from None


@contextmanager
def _fail_if_terminated() -> Iterator[None]:
    """Exit with 143 at SIGTERM, as other programs do; Lightning's exception alone would exit with 0.

    Ctrl-C stays a :class:`KeyboardInterrupt`, of which Lightning makes an exit with 1.
    """
    try:
        yield
    except SIGTERMException:  # a SystemExit too
        log.warning("training was terminated (SIGTERM). Run the command again to resume it.")
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def _build_trainer(folder: Path, epochs: int, run: RunConfig, callbacks: list[Callback]) -> L.Trainer:
    is_interactive = os.isatty(2)
    options: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    checkpoint = ModelCheckpoint(folder, filename="last", save_top_k=1, **options)
    trainer = L.Trainer(
        accelerator="auto",
        precision=run.precision if run.precision != "auto" else best_precision(),
        max_epochs=epochs,
        check_val_every_n_epoch=run.validate_every,
        logger=open_logs(folder, run.tracker),
        callbacks=[*callbacks, TQDMProgressBar() if is_interactive else EpochLogger(), checkpoint],
        enable_progress_bar=is_interactive,
        enable_model_summary=False,
        gradient_clip_val=run.clip or None,
        gradient_clip_algorithm=None if run.clip_by == "norm" else "value",
        accumulate_grad_batches=run.accumulate,
        num_sanity_val_steps=0,
        log_every_n_steps=_SYNC_INTERVAL,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpoint()],
        **trainer_options(run.strategy),
    )
    _share_signals_rarely(trainer)
    return trainer


def _share_signals_rarely(trainer: L.Trainer) -> None:
    """Let processes exchange signals to end in every tenth batch; Lightning does so in each, and waits for the GPU."""
    loop = trainer.fit_loop.epoch_loop
    share = loop._broadcast_sigterm_tensor

    def share_rarely() -> None:
        if (loop.batch_idx + 1) % _SYNC_INTERVAL == 0:
            share()

    loop._broadcast_sigterm_tensor = share_rarely  # type: ignore[method-assign]


def best_precision() -> Literal["32-true", "bf16-mixed"]:
    """Return bf16 if the hardware multiplies it, else float32 (emulated bf16 is slower)."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"
