"""Compare a training in several processes with a single process: losses epoch by epoch."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError


@dataclass(frozen=True)
class DistributedRun:
    """Finished training.

    Attributes:
        artifact: Artifact of the training.
        losses: Mean loss of an epoch over all processes, by its last step.
    """

    artifact: Artifact
    losses: dict[int, float]


# Log of the first stage, and its column.
_LOGS = {"teacher train": ("metrics-stage-1.csv", "loss_epoch"), "student distill": ("metrics.csv", "cosine_epoch")}


def train_spread(
    arguments: list[str],
    output: Path,
    processes: int,
    batch: int,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    verb: str = "teacher train",
) -> DistributedRun:
    """Train in ``processes`` processes on the CPU (gloo), each with its share of a global batch.

    Args:
        arguments: Flags of the command, without output, batch size and strategy.
        output: Path of the artifact.
        processes: Number of processes; 1 runs without torchrun.
        batch: Global batch size, a multiple of ``processes``.
        strategy: Strategy of several processes.
        verb: ``teacher train`` or ``student distill``.

    Raises:
        UserError: The training failed.
    """
    command = [sys.executable, "-m", "vpr"]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "vpr"]
        command = [sys.executable, "-m", *launcher]
    command += [*verb.split(), *arguments, "--output", str(output), "--run.strategy", strategy]
    command += ["--loader.batch-size", str(batch // processes)]
    # The number of threads changes the order of sums; with one each, only the processes differ.
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if process.returncode:
        raise UserError(f"training: it failed ({process.stderr.strip()[-800:]}). Run {' '.join(command)} by hand.")
    artifact, (log, column) = load_artifact(output), _LOGS[verb]
    return DistributedRun(artifact, read_losses(artifact.file(log), column))


def read_losses(log: Path, column: str = "loss_epoch") -> dict[int, float]:
    """Return the losses of a column by step from a training's CSV log."""
    with log.open(newline="", encoding="utf-8") as stream:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(stream) if row.get(column)}
