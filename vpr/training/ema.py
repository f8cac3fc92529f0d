"""Exponential moving average of a module's weights during training."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class Ema(Callback):
    """Average weights and floating-point buffers after every step, and validate the average.

    ``shadow = d * shadow + (1 - d) * weight`` with ``d = min(decay, (1 + n) / (10 + n))`` after n steps, so that
    the random initial weights are soon forgotten (as in ``tf.train.ExponentialMovingAverage``).
    """

    state_key = "ema"

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {}
        self.updates = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the average from the current weights unless a checkpoint restored it."""
        if not self.shadow:
            self.shadow = {name: value.clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Update the average once per optimiser step, not per accumulated batch."""
        if trainer.global_step <= self.updates:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates = trainer.global_step
        pairs = self._pairs(module)
        for value, average in pairs:
            if not average.is_floating_point():
                average.copy_(value)
        for is_sharded in (False, True):  # a few kernels on a GPU, instead of one for each tensor
            floats = [pair for pair in pairs if pair[1].is_floating_point()]
            group = [pair for pair in floats if isinstance(pair[1], DTensor) == is_sharded]
            if group:
                values, averages = zip(*group, strict=True)
                torch._foreach_lerp_(averages, values, 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Swap the average into the module."""
        self._swap(module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Swap the weights back into the module."""
        self._swap(module)

    def state_dict(self) -> dict[str, Any]:
        """Return the average for the checkpoint; every process must call it."""
        full = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in self.shadow.items()}
        return {"updates": self.updates, "shadow": {name: value.cpu() for name, value in full.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the average from a checkpoint."""
        self.updates, self.shadow = state_dict["updates"], state_dict["shadow"]

    @torch.no_grad()
    def _swap(self, module: L.LightningModule) -> None:
        for value, average in self._pairs(module):
            weight = value.clone()
            value.copy_(average)
            average.copy_(weight)

    def _pairs(self, module: L.LightningModule) -> list[tuple[Tensor, Tensor]]:
        """Return each weight with its average, the average on the weight's device and sharded like it."""
        pairs = []
        for name, value in module.state_dict().items():
            average = self.shadow[name]
            if isinstance(value, DTensor) and not isinstance(average, DTensor):  # restored from a checkpoint
                average = distribute_tensor(average.to(value.device), value.device_mesh, value.placements)
            self.shadow[name] = average = average.to(value.device)
            pairs.append((value, average))
        return pairs
