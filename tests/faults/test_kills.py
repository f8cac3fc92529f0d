"""``kill -9``: at random moments of every stage, and at each change of a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fault_stages import STAGES, difference, leftovers
from benchmarks.faults import Road
from benchmarks.kills import every_step, kill_figures
from tests.faults.conftest import LAST
from vpr.artifact import CARD_NAME

NAMES = [stage.name for stage in STAGES]


@pytest.mark.parametrize("name", NAMES[: NAMES.index(LAST) + 1])
def test_a_killed_stage_goes_on_to_the_unbroken_result(road: Road, tmp_path: Path, name: str) -> None:
    told = road.strike(road.stages[name], np.random.default_rng(len(name)), tmp_path / "killed")
    assert told.kills
    assert not told.faulty, told


def test_a_kill_at_any_change_of_a_file_does_no_harm(road: Road) -> None:
    struck = every_step(road, road.stages["int8"])
    assert len(struck) > 10
    assert not [told for told in struck if told.faulty]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student", "shard-embeddings"])
def test_a_kill_at_any_change_of_a_file_of_a_longer_run(road: Road, name: str) -> None:
    struck = every_step(road, road.stages[name])
    assert len(struck) > 50
    assert not [told for told in struck if told.faulty]


@pytest.mark.slow
def test_the_figures_are_those_of_all_stages(tmp_path: Path) -> None:
    figures, table = kill_figures(tmp_path, "make figures", times=1)
    assert [row["stage"] for row in table] == NAMES
    assert figures[0].value == sum(row["kills"] for row in table) >= len(NAMES)
    assert [figure for figure in figures if figure.goal == 0]
    assert not [figure for figure in figures if figure.goal == 0 and figure.value]


def test_another_result_and_a_file_too_many_are_found(road: Road, tmp_path: Path) -> None:
    stage = road.stages["int8"]
    output, unbroken = tmp_path / stage.name, road.unbroken(stage)
    shutil.copytree(unbroken, output)
    assert not difference(stage, unbroken, output)
    assert not leftovers(unbroken.parent, tmp_path)
    card = json.loads((output / CARD_NAME).read_bytes())
    card["metrics"]["kept"] = ["none"]
    (output / CARD_NAME).write_text(json.dumps(card), encoding="utf-8")
    (tmp_path / ".int8.partial-x").mkdir()
    (tmp_path / ".int8.partial-x" / "model.onnx").touch()
    assert difference(stage, unbroken, output) == "metrics"
    assert leftovers(unbroken.parent, tmp_path) == [".int8.partial-x/model.onnx"]
