"""A disk that is full: one line says so, nothing that was there is lost, and with room the run goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from benchmarks.fault_stages import difference, leftovers
from benchmarks.faults import Ended, Road, limit_files
from vpr.artifact import load_artifact

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
def test_a_file_that_finds_no_room(road: Road, tmp_path: Path, name: str, share: float) -> None:
    stage, output = road.stages[name], tmp_path / name
    unbroken = load_artifact(road.unbroken(stage))
    largest = max(entry.size for entry in unbroken.card.files.values())
    road.lay_older(stage, output)
    older = (output / "card.json").read_bytes()
    line = refused(road.run(stage, output, prepare=partial(limit_files, int(share * largest))))
    assert "the disk has no room (File too large)" in line
    assert (output / "card.json").read_bytes() == older
    load_artifact(output)
    assert not list(tmp_path.glob(".*"))
    assert road.run(stage, output).code == 0
    assert not difference(stage, road.unbroken(stage), output)
    assert not leftovers(road.unbroken(stage).parent, tmp_path)
