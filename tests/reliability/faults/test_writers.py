"""Two processes that write the same name while another one reads it."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.reliability.faults.injection import before_file
from tests.reliability.faults.pipeline import Pipeline
from tests.reliability.faults.test_full_disk import error_line
from vpr.artifacts.store import load_artifact

WRITER = """
import sys
from vpr.artifacts.writer import write_artifact
for number in range(40):
    with write_artifact(sys.argv[1], "report", {"writer": sys.argv[2], "number": number}) as draft:
        for name in "abc":
            (draft.path / name).write_text(f"{sys.argv[2]} {number}" * 1000)
"""


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def test_reader_sees_complete_artifacts_only(tmp_path: Path) -> None:
    output = tmp_path / "shared"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(output), name]) for name in ("first", "second")]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if seen or output.exists():
            config = load_artifact(output).card.config
            seen.add((config["writer"], config["number"]))
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(seen) > 5
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


@pytest.mark.reliability
def test_two_commands_with_one_output_succeed(pipeline: Pipeline, tmp_path: Path) -> None:
    stage, output = pipeline.stages["int8"], tmp_path / "int8"
    processes = [pipeline.start(stage, output) for _ in range(2)]
    assert [process.wait().code for process in processes] == [0, 0]
    assert not pipeline.differences(stage, output)


@pytest.mark.reliability
def test_training_started_twice_is_rejected(pipeline: Pipeline, tmp_path: Path) -> None:
    stage, output, resume = pipeline.stages["teacher"], tmp_path / "teacher", tmp_path / "resume"
    first = pipeline.start(stage, output, partial(before_file, 2, "*/stage-1/last.ckpt", partial(wait_for, resume)))
    try:
        while first.is_alive and not list(tmp_path.glob("*.run-*/stage-1/last.ckpt")):
            time.sleep(0.01)
        assert "another process works in this folder. Wait until it ends" in error_line(pipeline.run(stage, output))
    finally:
        resume.touch()
        process = first.wait()
    assert process.code == 0, process.output
    resume.unlink()
    assert load_artifact(output)
    assert not pipeline.differences(stage, output)
