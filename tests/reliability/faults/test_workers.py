"""A killed worker or training process: the command ends, and resumes when it is run again."""

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

from tests.reliability.faults.pipeline import Pipeline, wait_for_orphans
from tests.reliability.faults.stages import differences, leftovers

pytestmark = pytest.mark.reliability
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# At its second file a process kills the process of the given rank.
KILL_RANK = """
import os, signal, sys
import psutil
from tests.reliability.faults.injection import before_file
from vpr.cli import main

def kill():
    ranks = sorted(psutil.Process(os.getppid()).children(), key=lambda process: (process.create_time(), process.pid))
    ranks[int(sys.argv[3])].kill()

if __name__ == "__main__":  # processes of the fork server import this file
    if os.environ["RANK"] == sys.argv[2]:
        before_file(2, sys.argv[1], kill)
    main(sys.argv[4:])
"""
# In its second stage a training process kills its loader's worker, or itself.
KILL_IN_TRAINING = """
import multiprocessing, os, signal, sys
from tests.reliability.faults.injection import before_file, die
from vpr.cli import main

def kill_worker():  # the oldest worker reads the images of the training steps
    os.kill(min(process.pid for process in multiprocessing.active_children()), signal.SIGKILL)

def kill_training():
    print(len(multiprocessing.active_children()), flush=True)
    die()

if __name__ == "__main__":
    before_file(2, "*/stage-2/last.ckpt", globals()[f"kill_{sys.argv[1]}"])
    main(sys.argv[2:])
"""


@dataclass(frozen=True)
class EndedScript:
    """A script that has ended; its orphans were killed."""

    code: int
    out: str
    err: str
    orphans: tuple[str, ...]


def run_python(*arguments: object) -> EndedScript:
    """Run Python. Its children are known by a variable: a launcher gives each of its processes a session."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3]), "MARK": mark}
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:  # pipes would stay open until all children end
        command = [sys.executable, *map(str, arguments)]
        code = subprocess.run(command, stdout=out, stderr=err, env=environment, check=False).returncode
        orphans = wait_for_orphans(lambda process: process.environ().get("MARK") == mark)
        for orphan in orphans:
            os.kill(int(orphan.removeprefix("process ")), signal.SIGKILL)
        out.seek(0)
        err.seek(0)
        return EndedScript(code, out.read(), err.read(), orphans)


def write_script(path: Path, code: str) -> Path:
    path.write_text(code, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "pattern", "killer", "rank"),
    [
        ("shard-embeddings", "*/part-*.npy", 0, 0),
        ("shard-embeddings", "*/part-*.npy", 1, 1),  # each rank writes its own parts, and either may be the quicker one
        ("teacher", "*/stage-1/last.ckpt", 0, 0),
        ("teacher", "*/stage-1/last.ckpt", 0, 1),
    ],
)
def test_killed_rank_ends_run_that_then_resumes(
    pipeline: Pipeline, tmp_path: Path, name: str, pattern: str, killer: int, rank: int
) -> None:
    stage, output = pipeline.stages[name], tmp_path / "killed" / name
    output.parent.mkdir()
    script = write_script(tmp_path / "script.py", KILL_RANK)
    killed = run_python(*TWO_PROCESSES, script, pattern, killer, rank, *pipeline.words(stage, output))
    assert killed.code
    assert "SIGKILL" in killed.err
    assert not killed.orphans
    assert not output.exists()
    assert list(output.parent.glob(f"*.run-*{pattern[1:]}"))
    resumed = run_python(*TWO_PROCESSES, "-m", "vpr", *pipeline.words(stage, output))
    assert resumed.code == 0, resumed.err
    expected = pipeline.expected(stage)
    if name == "teacher":  # two processes draw other batches than one
        expected = tmp_path / "expected" / name
        expected.parent.mkdir()
        uninterrupted = run_python(*TWO_PROCESSES, "-m", "vpr", *pipeline.words(stage, expected))
        assert uninterrupted.code == 0, uninterrupted.err
    assert not differences(stage, expected, output)
    assert not leftovers(expected.parent, output.parent)


def test_killed_loader_worker_is_one_error_line(pipeline: Pipeline, tmp_path: Path) -> None:
    stage, output = pipeline.stages["teacher"], tmp_path / "killed" / "teacher"
    output.parent.mkdir()
    script = write_script(tmp_path / "script.py", KILL_IN_TRAINING)
    killed = run_python(script, "worker", *pipeline.words(stage, output))
    assert killed.code == 2
    assert killed.err.splitlines()[-1].startswith("vpr: error: a process that reads images was lost")
    assert not killed.orphans
    resumed = run_python("-m", "vpr", *pipeline.words(stage, output))
    assert resumed.code == 0, resumed.err
    assert not differences(stage, pipeline.expected(stage), output)
    assert not leftovers(pipeline.expected(stage).parent, output.parent)


def test_killed_training_leaves_no_workers(pipeline: Pipeline, tmp_path: Path) -> None:
    script = write_script(tmp_path / "script.py", KILL_IN_TRAINING)
    killed = run_python(script, "training", *pipeline.words(pipeline.stages["teacher"], tmp_path / "teacher"))
    assert (killed.code, killed.out) == (-signal.SIGKILL, "2\n"), killed.err
    assert not killed.orphans


def test_script_without_main_guard_is_rejected(pipeline: Pipeline, tmp_path: Path) -> None:
    script = write_script(tmp_path / "script.py", "import sys\nfrom vpr.cli import main\nmain(sys.argv[1:])\n")
    rejected = run_python(script, *pipeline.words(pipeline.stages["teacher"], tmp_path / "teacher"))
    assert rejected.code == 2
    assert 'put what it does under if __name__ == "__main__":\n' in rejected.err
    assert not rejected.orphans
