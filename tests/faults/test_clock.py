"""A clock that is wrong: nothing that decides what is done asks it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.fault_stages import difference, leftovers
from benchmarks.faults import Road, set_clock_back
from vpr.artifact import load_artifact

FUTURE = 4102444800  # 2100


# INT8 is inserted in less time than a kill takes to come.
@pytest.mark.parametrize("name", ["teacher", "student", "shard-embeddings"])
def test_a_run_goes_on_under_a_clock_that_was_set_back(road: Road, tmp_path: Path, name: str) -> None:
    stage, output = road.stages[name], tmp_path / name
    assert road.run(stage, output, until=0.6 * road.work[name]).killed
    for path in tmp_path.rglob("*"):
        os.utime(path, (FUTURE, FUTURE))
    done = road.run(stage, output, prepare=set_clock_back)
    assert done.code == 0, done.output
    assert load_artifact(output).card.created.startswith("2001-")
    assert not difference(stage, road.unbroken(stage), output)
    assert not leftovers(road.unbroken(stage).parent, tmp_path)
    assert "up to date" in road.run(stage, output).output
