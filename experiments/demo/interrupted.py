"""What a ``kill -9`` costs a training: run it unbroken, run it killed half-way and resumed, compare.

Any training by any flags, as it is typed, after half of its epochs; :mod:`tests.reliability.faults.kills` kills every stage at any
moment, on inputs so tiny that it can do so hundreds of times.
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
    """Two finished runs of the same training.

    Attributes:
        unbroken: the artifact of the run that was left alone.
        resumed: the artifact of the run that was killed and started again.
        epochs_before_kill: checkpoints that the killed run had written.
    """

    unbroken: Artifact
    resumed: Artifact
    epochs_before_kill: int


def interrupt(verb: str, arguments: list[str], folder: Path, epochs: int) -> Interruption:
    """Train twice with the same command, the second time with a kill after half of the epochs.

    Args:
        verb: ``teacher train`` or ``student distill``.
        arguments: its flags, without ``--output``.
        folder: where both artifacts are written.
        epochs: that the training has.

    Raises:
        UserError: the training ended before it could be killed, or did not finish.
    """
    command = [sys.executable, "-m", "vpr", *verb.split(), *arguments, "--output"]
    unbroken, resumed = folder / "unbroken", folder / "resumed"
    _finish([*command, str(unbroken)])
    with subprocess.Popen([*command, str(resumed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        seen = _wait_for_checkpoints(process, resumed, epochs // 2)
        process.send_signal(signal.SIGKILL)
    if resumed.exists():
        raise UserError(f"{resumed}: an artifact was there before the training had finished: report this")
    _finish([*command, str(resumed)])
    return Interruption(load_artifact(unbroken), load_artifact(resumed), seen)


def _finish(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"training failed: {done.stderr.strip()[-500:]}: run the command by hand")


def _wait_for_checkpoints(process: subprocess.Popen[bytes], output: Path, wanted: int) -> int:
    written: set[int] = set()
    while len(written) < wanted:
        if process.poll() is not None:
            raise UserError(f"{output}: the training ended before it could be killed: give it more epochs")
        # A teacher's stages have folders of their own. No `**`: it would walk into folders that come and go.
        for place in ("", "stage-*/"):
            for checkpoint in output.parent.glob(f"{output.name}.run-*/{place}last.ckpt"):
                written.add(checkpoint.stat().st_mtime_ns)
        time.sleep(0.02)
    return len(written)
