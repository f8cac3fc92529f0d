"""A wrong clock: no decision depends on it."""

from __future__ import annotations

import fnmatch
import os
from functools import partial
from pathlib import Path

import pytest

from tests.reliability.faults.injection import before_file, die, set_clock_back
from tests.reliability.faults.pipeline import Pipeline
from vpr.artifacts.store import load_artifact

pytestmark = pytest.mark.reliability
YEAR_2100 = 4102444800


@pytest.mark.parametrize(
    ("name", "work"),
    [("teacher", "*/stage-2/last.ckpt"), ("student", "*/last.ckpt"), ("shard-embeddings", "*/part-*.npy")],
)
def test_stage_resumes_with_clock_set_back(pipeline: Pipeline, tmp_path: Path, name: str, work: str) -> None:
    stage, output = pipeline.stages[name], tmp_path / name
    assert pipeline.run(stage, output, prepare=partial(before_file, 3, work, die)).was_killed
    assert fnmatch.filter(map(str, tmp_path.rglob("*")), work)
    for path in tmp_path.rglob("*"):
        os.utime(path, (YEAR_2100, YEAR_2100))
    process = pipeline.run(stage, output, prepare=set_clock_back)
    assert process.code == 0, process.output
    assert load_artifact(output).card.created.startswith("2001-")
    assert not pipeline.differences(stage, output)
    assert "up to date" in pipeline.run(stage, output).output
