from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from teacher.config import RunsConfig
from teacher.runs import find_runs, runs
from tests.conftest import edit_card
from vpr.artifacts.run_folder import run_folder
from vpr.artifacts.store import load_artifact, write_artifact
from vpr.cli import main
from vpr.common.errors import UserError


def config(**changes: Any) -> dict[str, Any]:
    stages = [{"train": "head", "epochs": 1}, {"train": "all", "epochs": 3}]
    return {"recipe": "guie-2nd", "stages": stages, "head": {"loss": "arcface"}, "seed": 7} | changes


def teacher(path: Path, recall: float, leak: bool = False, **changes: Any) -> Path:
    with write_artifact(path, "teacher", config(**changes)) as draft:
        (draft.path / "model.safetensors").write_bytes(b"weights")
        draft.catalog = {"images": {"train": 640}, **({"leak": {"train in test": {}}} if leak else {})}
        draft.metrics = {"val_recall_at_1": recall, "best_epoch": 4, "seconds": 3725.4}
    return path


def log(folder: Path, name: str, lines: list[str], checkpoint: bool = True) -> None:
    """A CSV log as Lightning writes it: losses by step and by epoch, and the validation's."""
    (folder / name).mkdir(parents=True)
    header = "epoch,loss_epoch,loss_step,step,val_map,val_recall_at_1,val_recall_at_5"
    (folder / name / "metrics.csv").write_text("\n".join([header, *lines]))
    if checkpoint:
        (folder / "last.ckpt").touch()


def test_a_finished_teacher_is_told_by_its_card(tmp_path: Path) -> None:
    teacher(tmp_path / "first" / "teacher", 0.5)
    (run,) = find_runs(tmp_path)
    assert (run.name, run.recipe, run.stages, run.loss) == ("first/teacher", "guie-2nd", "head 1 + all 3", "arcface")
    assert (run.seed, run.val_recall_at_1, run.best_epoch, run.seconds) == (7, 0.5, 4, 3725.4)
    assert (run.images, run.state) == (640, "finished")


def test_the_best_comes_first_and_other_kinds_are_left_out(tmp_path: Path) -> None:
    for name, recall in (("b", 0.25), ("c", 0.75), ("a", 0.25)):
        teacher(tmp_path / name, recall, leak=name == "c")
    with write_artifact(tmp_path / "student", "student", config()):
        pass
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "card.json").write_text("{")
    found = runs(RunsConfig(str(tmp_path)))
    assert [run.name for run in found] == ["c", "a", "b", "damaged"]
    assert [run.state for run in found[:3]] == ["finished, leak", "finished", "finished"]


def test_weights_are_not_read(tmp_path: Path) -> None:
    path = teacher(tmp_path / "teacher", 0.5)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        load_artifact(path)
    assert [run.state for run in find_runs(tmp_path)] == ["finished"]


def test_a_soup_has_no_stages(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "soup", "teacher", {"recipe": "greedy soup", "seed": 0}) as draft:
        draft.metrics = {"val_recall_at_1": 0.5}
    (run,) = find_runs(tmp_path)
    assert (run.recipe, run.stages, run.loss, run.best_epoch) == ("greedy soup", None, None, None)


def test_an_unfinished_run_is_told_by_its_logs(tmp_path: Path) -> None:
    """Two epochs of the first stage, then two of the second; the second's recall is what counts."""
    folder = tmp_path / "teacher.run-0123456789ab"
    log(folder / "stage-1", "csv-0", ["0,,9.0,0,,,", "0,,,5,0.2,0.9,0.9", "0,8.0,,5,,,", "1,7.0,,11,,,"])
    log(folder / "stage-2", "csv-0", ["0,,,5,0.2,0.50,0.9", "0,6.0,,5,,,", "1,,5.0,9,,,"])
    log(folder / "stage-2", "csv-1", ["1,,,11,0.2,0.75,0.9", "1,5.0,,11,,,", "2,,4.0,15,,,", "2,,4.0"])
    (run,) = find_runs(tmp_path)
    assert (run.name, run.state) == ("teacher.run-0123456789ab", "unfinished at epoch 4")
    assert (run.val_recall_at_1, run.best_epoch) == (0.75, 4)


def test_an_unfinished_run_s_configuration_is_told(tmp_path: Path) -> None:
    for name, text in (("a", json.dumps(config())), ("b", '{"stages": [{"tra')):
        folder = tmp_path / f"{name}.run-0123456789ab"
        log(folder / "stage-1", "csv-0", ["0,8.0,,5,,,"])
        (folder / "config.json").write_text(text)
    told, cut = find_runs(tmp_path)
    assert (told.recipe, told.stages, told.loss, told.seed) == ("guie-2nd", "head 1 + all 3", "arcface", 7)
    assert (cut.recipe, cut.stages, cut.state) == (None, None, "unfinished at epoch 1")


def test_a_run_that_has_just_begun_is_listed(tmp_path: Path) -> None:
    log(tmp_path / "teacher.run-0123456789ab" / "stage-1", "csv-0", ["0,,9.0,0,,,"], checkpoint=False)
    (run,) = find_runs(tmp_path)
    assert (run.state, run.val_recall_at_1) == ("unfinished at epoch 0", None)


def test_a_finished_runs_logs_are_not_listed_again_but_a_changed_configurations_are(tmp_path: Path) -> None:
    """An artifact stays until the run of a new configuration, whose folder has another name, has finished."""
    card = load_artifact(teacher(tmp_path / "teacher", 0.5)).card
    done = run_folder(str(tmp_path / "teacher"), card.config, card.parents)
    log(done / "stage-1", "csv-0", ["0,8.0,,5,,,", "0,,,5,0.2,0.5,0.9"], checkpoint=False)
    assert [run.name for run in find_runs(tmp_path)] == ["teacher"]
    again = run_folder(str(tmp_path / "teacher"), config(seed=8), [])
    log(again / "stage-1", "csv-0", ["0,8.0,,5,,,", "0,,,5,0.2,0.25,0.9"])
    replaced = run_folder(str(tmp_path / "teacher"), config(seed=9), [])
    log(replaced / "stage-1", "csv-0", ["0,8.0,,5,,,", "0,,,5,0.2,0.75,0.9"], checkpoint=False)
    states = {run.name: run.state for run in find_runs(tmp_path)}
    assert states == {"teacher": "finished", again.name: "unfinished at epoch 1", replaced.name: "artifact gone"}


def test_a_students_run_is_left_out(tmp_path: Path) -> None:
    log(tmp_path / "student.run-0123456789ab", "csv-0", ["0,8.0,,5,,,"])
    assert find_runs(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": 3}, None),
        ({"schema": 99}, "damaged: written by a newer version"),
        ({"schema": "one"}, "damaged: its card is no card"),
        ({"parents": 3}, "damaged: key 'parents' of its card"),
        ({"config": {"stages": 3}}, "damaged: its card's values"),
        ({"config": {"head": "arcface"}}, "damaged: its card's values"),
        ({"metrics": {"val_recall_at_1": "high"}}, "damaged: its card's values"),
        ({"metrics": {"best_epoch": float("inf")}}, "damaged: its card's values"),
        ({"metrics": {"seconds": 1e300}}, "damaged: its card's values"),
    ],
)
def test_damaged_cards_are_listed_as_such(tmp_path: Path, changes: dict[str, Any], reason: str | None) -> None:
    edit_card(teacher(tmp_path / "teacher", 0.5), **changes)
    teacher(tmp_path / "whole", 0.25)
    states = {run.name: run.state for run in runs(RunsConfig(str(tmp_path)))}
    assert states.pop("whole") == "finished"
    assert [state[: len(reason or "")] for state in states.values()] == ([reason] if reason else [])


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"kind": "teacher"}'])
def test_a_card_of_other_bytes_is_damaged(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "card.json").write_bytes(raw)
    assert [run.state for run in find_runs(tmp_path)] == ["damaged: its card is no card"]


def test_a_card_that_is_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    os.mkfifo(tmp_path / "teacher" / "card.json")
    assert "is no plain file" in find_runs(tmp_path)[0].state


@pytest.mark.parametrize("output", [".", "/", "absent/runs.csv"])
def test_an_output_that_is_no_file_is_refused_before_anything_is_read(output: str) -> None:
    with pytest.raises(UserError, match="output: .* is no file in a folder that exists"):
        RunsConfig(output=output)


def test_hidden_folders_links_and_artifacts_insides_are_not_looked_at(tmp_path: Path) -> None:
    teacher(tmp_path / "runs" / "teacher", 0.5)
    teacher(tmp_path / "runs" / "teacher" / "inside", 0.9)
    teacher(tmp_path / "runs" / ".teacher.partial-1", 0.9)
    teacher(tmp_path / "elsewhere", 0.9)
    os.symlink(tmp_path, tmp_path / "runs" / "link")
    assert [run.name for run in find_runs(tmp_path / "runs")] == ["teacher"]


def test_the_table_shows_names_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher(tmp_path / "[red]run", 0.5, recipe="[/] \x1b[2J")
    main(["teacher", "runs", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "[red]run" in shown
    assert "[/] " in shown
    assert "\x1b[2J" not in shown
    assert "1:02:05" in shown


def test_the_table_is_written_as_csv(tmp_path: Path) -> None:
    teacher(tmp_path / "runs" / "a, b", 0.5)
    main(["teacher", "runs", "--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "table.csv")])
    with (tmp_path / "table.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["name"] == "a, b"
    assert float(row["val_recall_at_1"]) == 0.5
    assert row["state"] == "finished"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: no such folder"):
        runs(RunsConfig(str(tmp_path / "absent")))
