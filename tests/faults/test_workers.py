"""A worker of a run of two processes that is killed: the run ends, and given again it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.fault_stages import difference, leftovers
from benchmarks.faults import Pipeline

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vpr")


def start(pipeline: Pipeline, name: str, output: Path) -> subprocess.Popen[bytes]:
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", *TORCHRUN, *pipeline.command(pipeline.stages[name], output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def workers(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii").split()
    return [int(child) for child in children]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sign"), [("shard-embeddings", "part-*.npy"), ("teacher", "stage-1/last.ckpt")])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_the_run_which_then_goes_on(
    pipeline: Pipeline, tmp_path: Path, name: str, sign: str, rank: int
) -> None:
    output = tmp_path / "killed" / name
    with start(pipeline, name, output) as launcher:
        while not list(output.parent.glob(f"*.run-*/{sign}")):
            assert launcher.poll() is None
            time.sleep(0.01)
        os.kill(workers(launcher.pid)[rank], signal.SIGKILL)
    assert launcher.returncode
    with start(pipeline, name, output) as again:
        pass
    assert again.returncode == 0
    unbroken = pipeline.unbroken(pipeline.stages[name])
    if name == "teacher":  # two processes have batches of their own
        unbroken = tmp_path / "unbroken" / name
        with start(pipeline, name, unbroken) as whole:
            pass
        assert whole.returncode == 0
    assert not difference(pipeline.stages[name], unbroken, output)
    assert not leftovers(unbroken.parent, output.parent)
