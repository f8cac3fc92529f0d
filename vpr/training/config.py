"""Configuration of a training run. Imports no heavy library, so help and errors in arguments are quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vpr.common.distributed import Strategy
from vpr.common.errors import UserError, check_numbers

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class RunConfig:
    """How a training is carried out.

    Attributes:
        precision: ``auto`` is bf16 where the hardware multiplies it.
        strategy: of several processes; ``auto`` is DDP, ``fsdp`` spreads the weights over them.
        accumulate: batches whose gradients make one step.
        ema: decay of the moving average of the weights, which is then what is validated and kept; 0 keeps none.
        clip: largest norm of the gradient; 0 does not clip.
        validate_every: epochs between validations; the last epoch always has one.
        tracker: logs to this service too, beside CSV and TensorBoard; its package must be installed.
    """

    precision: Precision = "auto"
    strategy: Strategy = "auto"
    accumulate: int = 1
    ema: float = 0.0
    clip: float = 1.0
    validate_every: int = 1
    tracker: Literal["none", "wandb", "mlflow"] = "none"

    def __post_init__(self) -> None:
        check_numbers(self, "run.", accumulate=(1, None), validate_every=(1, None))
        if not 0 <= self.ema < 1:
            raise UserError(f"run.ema: {self.ema}: give a decay from 0 (none) to below 1, such as 0.999")
        if not self.clip >= 0:
            raise UserError(f"run.clip: {self.clip}: give a norm, or 0 for none")
