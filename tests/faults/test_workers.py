"""A worker that is killed, or whose training is: the run ends, and given again it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fault_stages import difference, leftovers
from benchmarks.faults import Pipeline, survivors

TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# At its second file a process of a run kills the one of the given rank.
KILL_A_RANK = """
import os, signal, sys
from pathlib import Path
from benchmarks.fault_injection import before_file
from vpr.cli import main

def kill():
    launcher = os.getppid()
    ranks = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii").split()
    os.kill(int(ranks[int(sys.argv[3])]), signal.SIGKILL)

if __name__ == "__main__":  # what the fork server starts imports this
    if os.environ["RANK"] == sys.argv[2]:
        before_file(2, sys.argv[1], kill)
    main(sys.argv[4:])
"""
# In the middle of its second stage a training kills a process that reads pictures, or itself.
KILL_IN_TRAINING = """
import multiprocessing, os, signal, sys
from benchmarks.fault_injection import before_file, die
from vpr.cli import main

def kill_worker():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

def kill_training():
    print(len(multiprocessing.active_children()), flush=True)
    die()

if __name__ == "__main__":
    before_file(2, "*/stage-2/last.ckpt", globals()[f"kill_{sys.argv[1]}"])
    main(sys.argv[2:])
"""


def run(*arguments: object) -> tuple[subprocess.CompletedProcess[str], tuple[str, ...]]:
    """What became of a process of Python in a session of its own, and the processes that outlived it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    ) as process:
        said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *said), survivors(process.pid)


def written(path: Path, code: str) -> Path:
    path.write_text(code, encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sign", "by", "rank"),
    [
        ("shard-embeddings", "*/part-*.npy", 0, 0),
        ("shard-embeddings", "*/part-*.npy", 1, 1),  # each writes its own parts, and the second may be the quicker one
        ("teacher", "*/stage-1/last.ckpt", 0, 0),
        ("teacher", "*/stage-1/last.ckpt", 0, 1),
    ],
)
def test_a_killed_worker_ends_the_run_which_then_goes_on(
    pipeline: Pipeline, tmp_path: Path, name: str, sign: str, by: int, rank: int
) -> None:
    stage, output = pipeline.stages[name], tmp_path / "killed" / name
    output.parent.mkdir()
    script = written(tmp_path / "script.py", KILL_A_RANK)
    killed, left = run(*TWO_PROCESSES, script, sign, by, rank, *pipeline.command(stage, output))
    assert killed.returncode
    assert "SIGKILL" in killed.stderr
    assert not left
    assert not output.exists()
    assert list(output.parent.glob(f"*.run-*{sign[1:]}"))
    again, _ = run(*TWO_PROCESSES, "-m", "vpr", *pipeline.command(stage, output))
    assert again.returncode == 0, again.stderr
    unbroken = pipeline.unbroken(stage)
    if name == "teacher":  # two processes have batches of their own
        unbroken = tmp_path / "unbroken" / name
        unbroken.parent.mkdir()
        whole, _ = run(*TWO_PROCESSES, "-m", "vpr", *pipeline.command(stage, unbroken))
        assert whole.returncode == 0, whole.stderr
    assert not difference(stage, unbroken, output)
    assert not leftovers(unbroken.parent, output.parent)


def test_a_killed_loader_s_worker_is_told_in_a_line_and_the_training_goes_on(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    stage, output = pipeline.stages["teacher"], tmp_path / "killed" / "teacher"
    output.parent.mkdir()
    script = written(tmp_path / "script.py", KILL_IN_TRAINING)
    killed, left = run(script, "worker", *pipeline.command(stage, output))
    assert killed.returncode == 2
    assert killed.stderr.splitlines()[-1].startswith("vpr: error: a process that reads pictures was lost")
    assert not left
    again, _ = run("-m", "vpr", *pipeline.command(stage, output))
    assert again.returncode == 0, again.stderr
    assert not difference(stage, pipeline.unbroken(stage), output)
    assert not leftovers(pipeline.unbroken(stage).parent, output.parent)


def test_a_killed_training_takes_its_workers_with_it(pipeline: Pipeline, tmp_path: Path) -> None:
    script = written(tmp_path / "script.py", KILL_IN_TRAINING)
    killed, left = run(script, "training", *pipeline.command(pipeline.stages["teacher"], tmp_path / "teacher"))
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "2\n"), killed.stderr
    assert not left


def test_a_script_that_is_imported_by_its_workers_is_told_what_it_lacks(pipeline: Pipeline, tmp_path: Path) -> None:
    script = written(tmp_path / "script.py", "import sys\nfrom vpr.cli import main\nmain(sys.argv[1:])\n")
    done, left = run(script, *pipeline.command(pipeline.stages["teacher"], tmp_path / "teacher"))
    assert done.returncode == 2
    assert 'put what it does under if __name__ == "__main__":\n' in done.stderr
    assert not left
