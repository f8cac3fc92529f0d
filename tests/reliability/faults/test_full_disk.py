"""A disk that is full: one line says so, nothing that was there is lost, and with room the run goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.reliability.faults.injection import limit_files
from tests.reliability.faults.pipeline import Ended, Pipeline
from vpr.artifacts.store import load_artifact

STAGES = ("catalog", "teacher", "student", "shard-embeddings", "fp32", "ranges", "int8")


def refused(done: Ended) -> str:
    """The one line that a command ends with that cannot do its work."""
    assert done.code == 2, done.output
    assert "Traceback" not in done.output
    line = done.output.splitlines()[-1]
    assert line.startswith("vpr: error: ")
    return line


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("share", [0.9, 0.3])
def test_a_file_that_finds_no_room(pipeline: Pipeline, tmp_path: Path, name: str, share: float) -> None:
    stage, output = pipeline.stages[name], tmp_path / name
    unbroken = load_artifact(pipeline.unbroken(stage))
    largest = max(entry.size for entry in unbroken.card.files.values())
    pipeline.lay_older(stage, output)
    older = (output / "card.json").read_bytes()
    line = refused(pipeline.run(stage, output, prepare=partial(limit_files, int(share * largest))))
    assert "the disk has no room (File too large)" in line
    assert (output / "card.json").read_bytes() == older
    load_artifact(output)
    assert not list(tmp_path.glob(".*"))
    assert pipeline.run(stage, output).code == 0
    assert not pipeline.departures(stage, output)
