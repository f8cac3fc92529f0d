"""A clock that is wrong: nothing that decides what is done asks it."""

from __future__ import annotations

import fnmatch
import os
from functools import partial
from pathlib import Path

import pytest

from tests.reliability.faults.injection import before_file, die, set_clock_back
from tests.reliability.faults.pipeline import Pipeline
from vpr.artifacts.store import load_artifact

FUTURE = 4102444800  # 2100


@pytest.mark.parametrize(
    ("name", "work"),
    [("teacher", "*/stage-2/last.ckpt"), ("student", "*/last.ckpt"), ("shard-embeddings", "*/part-*.npy")],
)
def test_a_run_goes_on_under_a_clock_that_was_set_back(
    pipeline: Pipeline, tmp_path: Path, name: str, work: str
) -> None:
    stage, output = pipeline.stages[name], tmp_path / name
    assert pipeline.run(stage, output, prepare=partial(before_file, 3, work, die)).killed
    assert fnmatch.filter(map(str, tmp_path.rglob("*")), work)
    for path in tmp_path.rglob("*"):
        os.utime(path, (FUTURE, FUTURE))
    done = pipeline.run(stage, output, prepare=set_clock_back)
    assert done.code == 0, done.output
    assert load_artifact(output).card.created.startswith("2001-")
    assert not pipeline.departures(stage, output)
    assert "up to date" in pipeline.run(stage, output).output
