"""``kill -9`` at random moments of every stage, and at each change of a file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from tests.reliability.faults.conftest import LAST_STAGE
from tests.reliability.faults.killed_run import KilledRun, kill_at_random
from tests.reliability.faults.kills import kill_every_step, kill_figures, kill_stages
from tests.reliability.faults.pipeline import Pipeline
from tests.reliability.faults.stages import STAGES, differences, leftovers
from tests.reliability.progress import Progress
from vpr.artifacts.paths import CARD_NAME

NAMES = [stage.output for stage in STAGES]


_SLOW = {"teacher": pytest.mark.reliability}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_SLOW.get(name, ())) for name in NAMES[: NAMES.index(LAST_STAGE) + 1]]
)
def test_killed_stage_resumes_to_same_result(pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    run = kill_at_random(pipeline, pipeline.stages[name], np.random.default_rng(len(name)), tmp_path / "killed")
    assert run.kills
    assert not run.is_faulty, run


@pytest.mark.slow
def test_kill_at_any_file_change_is_harmless(pipeline: Pipeline) -> None:
    runs = kill_every_step(pipeline, pipeline.stages["int8"])
    assert len(runs) > 10
    assert not [run for run in runs if run.is_faulty]


@pytest.mark.reliability
@pytest.mark.parametrize("name", ["student", "shard-embeddings"])
def test_kill_at_any_change_of_longer_stages(pipeline: Pipeline, name: str) -> None:
    runs = kill_every_step(pipeline, pipeline.stages[name])
    assert len(runs) > 50
    assert not [run for run in runs if run.is_faulty]


@pytest.mark.reliability
def test_figures_cover_all_stages(tmp_path: Path) -> None:
    figures, table = kill_figures(tmp_path, "make figures", times=1)
    assert [row["stage"] for row in table] == NAMES
    assert figures[0].value == sum(row["kills"] for row in table) >= len(NAMES)
    assert [figure for figure in figures if figure.goal == 0]
    assert not [figure for figure in figures if figure.goal == 0 and figure.value]


def test_finished_stages_are_not_killed_again(tmp_path: Path) -> None:
    """The pipeline cannot run anything."""
    run = KilledRun("catalog", 2, "work", damaged=["card"], share_of_work=1.5)
    Progress(tmp_path / "kills.jsonl").add("catalog", [[asdict(run)], [asdict(run), asdict(run)]])
    pipeline = cast(Pipeline, SimpleNamespace(stages={"catalog": SimpleNamespace(output="catalog")}))
    random, stepped = kill_stages(pipeline, 1, 0, ("catalog",), Progress(tmp_path / "kills.jsonl"))
    assert (random, stepped) == ([run], [run, run])


def test_difference_and_leftover_are_detected(pipeline: Pipeline, tmp_path: Path) -> None:
    stage = pipeline.stages["int8"]
    output, expected = tmp_path / stage.output, pipeline.expected(stage)
    shutil.copytree(expected, output)
    assert not differences(stage, expected, output)
    assert not leftovers(expected.parent, tmp_path)
    card = json.loads((output / CARD_NAME).read_bytes())
    card["metrics"]["kept"] = ["none"]
    (output / CARD_NAME).write_text(json.dumps(card), encoding="utf-8")
    (tmp_path / ".int8.partial-x").mkdir()
    (tmp_path / ".int8.partial-x" / "model.onnx").touch()
    assert differences(stage, expected, output) == ["metrics"]
    assert leftovers(expected.parent, tmp_path) == [".int8.partial-x/model.onnx"]


@pytest.mark.reliability
def test_orphan_process_is_detected(pipeline: Pipeline, tmp_path: Path) -> None:
    stage = pipeline.stages["teacher"]
    process = pipeline.run(stage, tmp_path / "teacher", 0.1, partial(subprocess.Popen, ["sleep", "60"]))
    assert process.was_killed
    (orphan,) = process.orphans
    os.kill(int(orphan.removeprefix("process ")), signal.SIGKILL)
