"""Effect of ``kill -9`` on a training: an uninterrupted run against one killed half-way and resumed.

Works for any training command, killed after half of its epochs. :mod:`tests.reliability.faults.kills` kills every
stage at any moment, on tiny inputs.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError


@dataclass(frozen=True)
class Interruption:
    """Two finished trainings of the same configuration.

    Attributes:
        unbroken: Artifact of the training without a kill.
        resumed: Artifact of the training that was killed and resumed.
        epochs_before_kill: Number of checkpoints written before the kill.
    """

    unbroken: Artifact
    resumed: Artifact
    epochs_before_kill: int


def interrupt(verb: str, arguments: list[str], folder: Path, epochs: int) -> Interruption:
    """Train twice with the same command, the second time with a kill after half of the epochs.

    Args:
        verb: ``teacher train`` or ``student distill``.
        arguments: Flags of the command, without ``--output``.
        folder: Folder for both artifacts.
        epochs: Number of epochs of the training.

    Raises:
        UserError: The training ended before its kill, or did not finish.
    """
    command = [sys.executable, "-m", "vpr", *verb.split(), *arguments, "--output"]
    uninterrupted, resumed = folder / "unbroken", folder / "resumed"
    _finish([*command, str(uninterrupted)])
    with subprocess.Popen([*command, str(resumed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        checkpoints = _wait_for_checkpoints(process, resumed, epochs // 2)
        process.send_signal(signal.SIGKILL)
    if resumed.exists():
        raise UserError(f"{resumed}: the artifact existed before the training had finished. Report this as a bug.")
    _finish([*command, str(resumed)])
    return Interruption(load_artifact(uninterrupted), load_artifact(resumed), checkpoints)


def _finish(command: list[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise UserError(f"training: it failed ({process.stderr.strip()[-500:]}). Run {' '.join(command)} by hand.")


def _wait_for_checkpoints(process: subprocess.Popen[bytes], output: Path, count: int) -> int:
    times: set[int] = set()
    while len(times) < count:
        if process.poll() is not None:
            raise UserError(f"{output}: the training ended before its kill. Give it more epochs.")
        # A teacher has a folder for each stage. A pattern with `**` would enter folders that come and go.
        for stage in ("", "stage-*/"):
            for checkpoint in output.parent.glob(f"{output.name}.run-*/{stage}last.ckpt"):
                times.add(checkpoint.stat().st_mtime_ns)
        time.sleep(0.02)
    return len(times)
