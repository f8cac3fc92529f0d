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
from benchmarks.faults import Pipeline, survivors

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


def test_a_killed_loader_s_worker_is_told_in_a_line_and_the_training_goes_on(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    stage, output = pipeline.stages["teacher"], tmp_path / "killed" / "teacher"
    command = [sys.executable, "-m", "vpr", *pipeline.command(stage, output)]  # with a worker
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not list(output.parent.glob("*.run-*/stage-1/last.ckpt")):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(workers(process.pid)[0], signal.SIGKILL)
        said = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 2
    assert said.startswith("vpr: error: a process that reads pictures was lost")
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert not difference(stage, pipeline.unbroken(stage), output)
    assert not leftovers(pipeline.unbroken(stage).parent, output.parent)


# Python 3.14 starts processes by the fork server where none other is asked for; those before it fork.
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_killed_training_takes_its_workers_with_it(pipeline: Pipeline, tmp_path: Path, method: str) -> None:
    stage, output = pipeline.stages["teacher"], tmp_path / "killed" / "teacher"
    output.parent.mkdir()
    code = f"""
import multiprocessing, sys
from vpr.cli import main
if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    main(sys.argv[1:])
"""
    script = tmp_path / "train.py"
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, str(script), *pipeline.command(stage, output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment, start_new_session=True) as process:
        while not list(output.parent.glob("*.run-*/stage-1/last.ckpt")):
            assert process.poll() is None
            time.sleep(0.01)
        assert survivors(process.pid, 0)
        process.kill()
    assert not survivors(process.pid)
