"""A worker that is killed, or whose training is: the run ends, and given again it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from tests.reliability.faults.pipeline import Pipeline, processes, survivors
from tests.reliability.faults.stages import difference, leftovers

TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# At its second file a process of a run kills the one of the given rank.
KILL_A_RANK = """
import os, signal, sys
from pathlib import Path
from tests.reliability.faults.injection import before_file
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
# In the middle of its second stage a training kills a process that reads images, or itself.
KILL_IN_TRAINING = """
import multiprocessing, os, signal, sys
from tests.reliability.faults.injection import before_file, die
from vpr.cli import main

def kill_worker():
    os.kill(min(process.pid for process in multiprocessing.active_children()), signal.SIGKILL)  # reads for the steps

def kill_training():
    print(len(multiprocessing.active_children()), flush=True)
    die()

if __name__ == "__main__":
    before_file(2, "*/stage-2/last.ckpt", globals()[f"kill_{sys.argv[1]}"])
    main(sys.argv[2:])
"""


@dataclass(frozen=True)
class Done:
    """A process that has ended, what it said, and those that outlived it, which were killed."""

    code: int
    out: str
    err: str
    left: tuple[str, ...]


def run(*arguments: object) -> Done:
    """Run Python. What it starts is known by its environment: a launcher gives each of its processes a session."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3]), "MARK": mark}
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:  # pipes would be waited for until all have ended
        command = [sys.executable, *map(str, arguments)]
        code = subprocess.run(command, stdout=out, stderr=err, env=environment, check=False).returncode
        left = survivors(lambda: processes(lambda folder: mark.encode() in (folder / "environ").read_bytes()))
        for process in left:
            os.kill(int(process.removeprefix("process ")), signal.SIGKILL)
        out.seek(0)
        err.seek(0)
        return Done(code, out.read(), err.read(), left)


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
    killed = run(*TWO_PROCESSES, script, sign, by, rank, *pipeline.command(stage, output))
    assert killed.code
    assert "SIGKILL" in killed.err
    assert not killed.left
    assert not output.exists()
    assert list(output.parent.glob(f"*.run-*{sign[1:]}"))
    again = run(*TWO_PROCESSES, "-m", "vpr", *pipeline.command(stage, output))
    assert again.code == 0, again.err
    unbroken = pipeline.unbroken(stage)
    if name == "teacher":  # two processes have batches of their own
        unbroken = tmp_path / "unbroken" / name
        unbroken.parent.mkdir()
        whole = run(*TWO_PROCESSES, "-m", "vpr", *pipeline.command(stage, unbroken))
        assert whole.code == 0, whole.err
    assert not difference(stage, unbroken, output)
    assert not leftovers(unbroken.parent, output.parent)


def test_a_killed_loader_s_worker_is_told_in_a_line_and_the_training_goes_on(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    stage, output = pipeline.stages["teacher"], tmp_path / "killed" / "teacher"
    output.parent.mkdir()
    script = written(tmp_path / "script.py", KILL_IN_TRAINING)
    killed = run(script, "worker", *pipeline.command(stage, output))
    assert killed.code == 2
    assert killed.err.splitlines()[-1].startswith("vpr: error: a process that reads images was lost")
    assert not killed.left
    again = run("-m", "vpr", *pipeline.command(stage, output))
    assert again.code == 0, again.err
    assert not difference(stage, pipeline.unbroken(stage), output)
    assert not leftovers(pipeline.unbroken(stage).parent, output.parent)


def test_a_killed_training_takes_its_workers_with_it(pipeline: Pipeline, tmp_path: Path) -> None:
    script = written(tmp_path / "script.py", KILL_IN_TRAINING)
    killed = run(script, "training", *pipeline.command(pipeline.stages["teacher"], tmp_path / "teacher"))
    assert (killed.code, killed.out) == (-signal.SIGKILL, "2\n"), killed.err
    assert not killed.left


def test_a_script_that_is_imported_by_its_workers_is_told_what_it_lacks(pipeline: Pipeline, tmp_path: Path) -> None:
    script = written(tmp_path / "script.py", "import sys\nfrom vpr.cli import main\nmain(sys.argv[1:])\n")
    done = run(script, *pipeline.command(pipeline.stages["teacher"], tmp_path / "teacher"))
    assert done.code == 2
    assert 'put what it does under if __name__ == "__main__":\n' in done.err
    assert not done.left
