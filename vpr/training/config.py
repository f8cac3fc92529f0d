"""Configuration of the training loop. Imports no heavy library, so help and errors in arguments are instant."""

from dataclasses import dataclass
from typing import Literal

from vpr.common.distributed import Strategy
from vpr.common.errors import UserError, check_numbers

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class RunConfig:
    """Settings of the training loop.

    Attributes:
        precision: Numeric precision; ``auto`` is bf16 where the hardware multiplies it, else float32.
            ``16-mixed`` suits GPUs that multiply float16 only, such as Turing.
        strategy: Strategy for several processes; ``auto`` is DDP, ``fsdp`` shards the weights.
        accumulate: Batches whose gradients make one optimiser step.
        ema: Decay of the moving average of the weights, which is then validated and kept; 0 keeps no average.
        clip: Largest norm of the gradient, or with ``clip_by: value`` largest value in it; 0 does not clip.
        validate_every: Epochs between validations; the last epoch is always validated.
        tracker: Service to log to, in addition to CSV and TensorBoard; its package must be installed.
        clip_by: Clip the ``norm`` of the gradient, or each ``value`` in it.
        patience: Validations without a higher recall@1 after which the training, or the stage of a teacher, ends early.
            0 never ends early.
        compile: Compile the network with ``torch.compile``: the first steps take minutes, later ones less time. It
            needs a C++ compiler.
    """

    precision: Precision = "auto"
    strategy: Strategy = "auto"
    accumulate: int = 1
    ema: float = 0.0
    clip: float = 1.0
    validate_every: int = 1
    tracker: Literal["none", "wandb", "mlflow"] = "none"
    clip_by: Literal["norm", "value"] = "norm"
    compile: bool = False
    patience: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, "run.", accumulate=(1, None), validate_every=(1, None), patience=(0, None))
        if not 0 <= self.ema < 1:
            raise UserError(f"run.ema: expected 0 (no average) to below 1, got {self.ema}. Set a decay such as 0.999.")
        if self.compile and self.strategy == "fsdp":
            raise UserError("run.compile: sharded networks cannot be compiled. Leave out run.compile or fsdp.")
        if not self.clip >= 0:
            raise UserError(f"run.clip: expected 0 (no clipping) or more, got {self.clip}. Set a gradient norm.")

    def later_keys(self) -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("clip_by", "compile", "patience")
