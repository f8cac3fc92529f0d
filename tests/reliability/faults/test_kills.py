"""``kill -9``: at random moments of every stage, and at each change of a file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.reliability.faults.conftest import LAST
from tests.reliability.faults.killed_run import kill_at_random
from tests.reliability.faults.kills import every_step, kill_figures
from tests.reliability.faults.pipeline import Pipeline
from tests.reliability.faults.stages import STAGES, difference, leftovers
from vpr.artifacts.paths import CARD_NAME

NAMES = [stage.name for stage in STAGES]


@pytest.mark.parametrize("name", NAMES[: NAMES.index(LAST) + 1])
def test_a_killed_stage_goes_on_to_the_unbroken_result(pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    run = kill_at_random(pipeline, pipeline.stages[name], np.random.default_rng(len(name)), tmp_path / "killed")
    assert run.kills
    assert not run.faulty, run


def test_a_kill_at_any_change_of_a_file_does_no_harm(pipeline: Pipeline) -> None:
    runs = every_step(pipeline, pipeline.stages["int8"])
    assert len(runs) > 10
    assert not [run for run in runs if run.faulty]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student", "shard-embeddings"])
def test_a_kill_at_any_change_of_a_file_of_a_longer_run(pipeline: Pipeline, name: str) -> None:
    runs = every_step(pipeline, pipeline.stages[name])
    assert len(runs) > 50
    assert not [run for run in runs if run.faulty]


@pytest.mark.slow
def test_the_figures_are_those_of_all_stages(tmp_path: Path) -> None:
    figures, table = kill_figures(tmp_path, "make figures", times=1)
    assert [row["stage"] for row in table] == NAMES
    assert figures[0].value == sum(row["kills"] for row in table) >= len(NAMES)
    assert [figure for figure in figures if figure.goal == 0]
    assert not [figure for figure in figures if figure.goal == 0 and figure.value]


def test_another_result_and_a_file_too_many_are_found(pipeline: Pipeline, tmp_path: Path) -> None:
    stage = pipeline.stages["int8"]
    output, unbroken = tmp_path / stage.name, pipeline.unbroken(stage)
    shutil.copytree(unbroken, output)
    assert not difference(stage, unbroken, output)
    assert not leftovers(unbroken.parent, tmp_path)
    card = json.loads((output / CARD_NAME).read_bytes())
    card["metrics"]["kept"] = ["none"]
    (output / CARD_NAME).write_text(json.dumps(card), encoding="utf-8")
    (tmp_path / ".int8.partial-x").mkdir()
    (tmp_path / ".int8.partial-x" / "model.onnx").touch()
    assert difference(stage, unbroken, output) == ["metrics"]
    assert leftovers(unbroken.parent, tmp_path) == [".int8.partial-x/model.onnx"]


def test_a_process_that_outlives_a_kill_is_found(pipeline: Pipeline, tmp_path: Path) -> None:
    stage = pipeline.stages["teacher"]
    done = pipeline.run(stage, tmp_path / "teacher", 0.1, partial(subprocess.Popen, ["sleep", "60"]))
    assert done.killed
    (left,) = done.orphans
    os.kill(int(left.removeprefix("process ")), signal.SIGKILL)
