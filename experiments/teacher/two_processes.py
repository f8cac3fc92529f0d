"""Whether a training spread over processes is the training of one: the same losses, step by step."""

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
class Spread:
    """A finished training.

    Attributes:
        artifact: what it wrote.
        losses: by step; of the whole global batch.
    """

    artifact: Artifact
    losses: dict[int, float]


# The log of the first stage, and its column.
_LOGS = {"teacher train": ("metrics-stage-1.csv", "loss_step"), "student distill": ("metrics.csv", "cosine_step")}


def train_spread(
    arguments: list[str],
    output: Path,
    processes: int,
    batch: int,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    verb: str = "teacher train",
) -> Spread:
    """Train in ``processes`` processes on the CPU (gloo), each with its share of a global batch.

    Args:
        arguments: flags of the verb, without output, batch size and strategy.
        output: of the artifact.
        processes: 1 runs without torchrun.
        batch: global; a multiple of ``processes``.
        strategy: of several processes.
        verb: ``teacher train`` or ``student distill``.

    Raises:
        UserError: the training failed.
    """
    command = [sys.executable, "-m", "vpr"]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "vpr"]
        command = [sys.executable, "-m", *launcher]
    command += [*verb.split(), *arguments, "--output", str(output), "--run.strategy", strategy]
    command += ["--loader.batch-size", str(batch // processes)]
    # The number of threads changes the order of sums; one each makes the comparison of processes alone.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise UserError(f"training failed: {done.stderr.strip()[-800:]}: run {' '.join(command)}")
    artifact, (log, column) = load_artifact(output), _LOGS[verb]
    return Spread(artifact, read_losses(artifact.file(log), column))


def read_losses(log: Path, column: str = "loss_step") -> dict[int, float]:
    """Loss by step, from a training's CSV log."""
    with log.open(newline="", encoding="utf-8") as stream:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(stream) if row.get(column)}
