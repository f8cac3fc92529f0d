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
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.cli import main
from vpr.common.errors import UserError


def make_config(**changes: Any) -> dict[str, Any]:
    stages = [{"train": "head", "epochs": 1}, {"train": "all", "epochs": 3}]
    return {"recipe": "guie-2nd", "stages": stages, "head": {"loss": "arcface"}, "seed": 7} | changes


def write_teacher(path: Path, recall: float, leak: bool = False, **changes: Any) -> Path:
    with write_artifact(path, "teacher", make_config(**changes)) as writer:
        (writer.path / "model.safetensors").write_bytes(b"weights")
        writer.catalog = {"images": {"train": 640}, **({"leak": {"train in test": {}}} if leak else {})}
        writer.metrics = {"val_recall_at_1": recall, "best_epoch": 4, "seconds": 3725.4}
    return path


def write_log(folder: Path, name: str, lines: list[str], checkpoint: bool = True) -> None:
    """Write a CSV log like Lightning's: losses by step and by epoch, and validation scores."""
    (folder / name).mkdir(parents=True)
    header = "epoch,loss_epoch,loss_step,step,val_map,val_recall_at_1,val_recall_at_5"
    (folder / name / "metrics.csv").write_text("\n".join([header, *lines]))
    if checkpoint:
        (folder / "last.ckpt").touch()


def test_finished_teacher_is_read_from_its_card(tmp_path: Path) -> None:
    write_teacher(tmp_path / "first" / "teacher", 0.5)
    (run,) = find_runs(tmp_path)
    assert (run.name, run.recipe, run.stages, run.loss) == ("first/teacher", "guie-2nd", "head 1 + all 3", "arcface")
    assert (run.seed, run.val_recall_at_1, run.best_epoch, run.seconds) == (7, 0.5, 4, 3725.4)
    assert (run.images, run.state) == (640, "finished")


def test_losses_of_all_stages_are_listed(tmp_path: Path) -> None:
    pair = {"loss": "contrastive", "weight": 1.0}
    stages = [{"train": "all", "epochs": 1}, {"train": "all", "epochs": 3, "margin_weight": 0.0, "pair": pair}]
    proxy = {"loss": "soft-triple", "weight": 0.0}
    write_teacher(tmp_path / "teacher", 0.5, stages=stages, margin_weight=1.0, proxy=proxy, pair={"loss": "none"})
    assert find_runs(tmp_path)[0].loss == "arcface + contrastive"


def test_teachers_are_sorted_by_recall(tmp_path: Path) -> None:
    for name, recall in (("b", 0.25), ("c", 0.75), ("a", 0.25)):
        write_teacher(tmp_path / name, recall, leak=name == "c")
    with write_artifact(tmp_path / "student", "student", make_config()):
        pass
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "card.json").write_text("{")
    table = runs(RunsConfig(str(tmp_path)))
    assert [run.name for run in table] == ["c", "a", "b", "damaged"]
    assert [run.state for run in table[:3]] == ["finished, leak", "finished", "finished"]


def test_weights_are_not_read(tmp_path: Path) -> None:
    path = write_teacher(tmp_path / "teacher", 0.5)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        load_artifact(path)
    assert [run.state for run in find_runs(tmp_path)] == ["finished"]


def test_soup_has_no_stages(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "soup", "teacher", {"recipe": "greedy soup", "seed": 0}) as writer:
        writer.metrics = {"val_recall_at_1": 0.5}
    (run,) = find_runs(tmp_path)
    assert (run.recipe, run.stages, run.loss, run.best_epoch) == ("greedy soup", None, None, None)


def test_unfinished_run_is_read_from_its_logs(tmp_path: Path) -> None:
    """Two epochs of each stage; the recall is that of the second stage."""
    folder = tmp_path / "teacher.run-0123456789ab"
    write_log(folder / "stage-1", "csv-0", ["0,,9.0,0,,,", "0,,,5,0.2,0.9,0.9", "0,8.0,,5,,,", "1,7.0,,11,,,"])
    write_log(folder / "stage-2", "csv-0", ["0,,,5,0.2,0.50,0.9", "0,6.0,,5,,,", "1,,5.0,9,,,"])
    write_log(folder / "stage-2", "csv-1", ["1,,,11,0.2,0.75,0.9", "1,5.0,,11,,,", "2,,4.0,15,,,", "2,,4.0"])
    (run,) = find_runs(tmp_path)
    assert (run.name, run.state) == ("teacher.run-0123456789ab", "unfinished at epoch 4")
    assert (run.val_recall_at_1, run.best_epoch) == (0.75, 4)


def test_unfinished_run_has_its_configuration(tmp_path: Path) -> None:
    for name, text in (("a", json.dumps(make_config())), ("b", '{"stages": [{"tra')):
        folder = tmp_path / f"{name}.run-0123456789ab"
        write_log(folder / "stage-1", "csv-0", ["0,8.0,,5,,,"])
        (folder / "config.json").write_text(text)
    complete, truncated = find_runs(tmp_path)
    assert (complete.recipe, complete.stages) == ("guie-2nd", "head 1 + all 3")
    assert (complete.loss, complete.seed) == ("arcface", 7)
    assert (truncated.recipe, truncated.stages, truncated.state) == (None, None, "unfinished at epoch 1")


def test_run_that_has_just_started_is_listed(tmp_path: Path) -> None:
    write_log(tmp_path / "teacher.run-0123456789ab" / "stage-1", "csv-0", ["0,,9.0,0,,,"], checkpoint=False)
    (run,) = find_runs(tmp_path)
    assert (run.state, run.val_recall_at_1) == ("unfinished at epoch 0", None)


def test_logs_of_finished_runs_are_not_listed(tmp_path: Path) -> None:
    """The run folder of another configuration has another name, so it is listed in addition."""
    card = load_artifact(write_teacher(tmp_path / "teacher", 0.5)).card
    done = run_folder(str(tmp_path / "teacher"), card.config, card.parents)
    write_log(done / "stage-1", "csv-0", ["0,8.0,,5,,,", "0,,,5,0.2,0.5,0.9"], checkpoint=False)
    assert [run.name for run in find_runs(tmp_path)] == ["teacher"]
    again = run_folder(str(tmp_path / "teacher"), make_config(seed=8), [])
    write_log(again / "stage-1", "csv-0", ["0,8.0,,5,,,", "0,,,5,0.2,0.25,0.9"])
    replaced = run_folder(str(tmp_path / "teacher"), make_config(seed=9), [])
    write_log(replaced / "stage-1", "csv-0", ["0,8.0,,5,,,", "0,,,5,0.2,0.75,0.9"], checkpoint=False)
    states = {run.name: run.state for run in find_runs(tmp_path)}
    assert states == {"teacher": "finished", again.name: "unfinished at epoch 1", replaced.name: "artifact gone"}


def test_run_of_a_student_is_not_listed(tmp_path: Path) -> None:
    write_log(tmp_path / "student.run-0123456789ab", "csv-0", ["0,8.0,,5,,,"])
    assert find_runs(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": 3}, None),
        ({"schema": 99}, "damaged: written by a newer version"),
        ({"schema": "one"}, "damaged: the card is invalid"),
        ({"parents": 3}, "damaged: invalid key 'parents' in the card"),
        ({"config": {"stages": 3}}, "damaged: invalid value in the card"),
        ({"config": {"head": "arcface"}}, "damaged: invalid value in the card"),
        ({"metrics": {"val_recall_at_1": "high"}}, "damaged: invalid value in the card"),
        ({"metrics": {"best_epoch": float("inf")}}, "damaged: invalid value in the card"),
        ({"metrics": {"seconds": 1e300}}, "damaged: invalid value in the card"),
    ],
)
def test_damaged_cards_are_listed_as_damaged(tmp_path: Path, changes: dict[str, Any], reason: str | None) -> None:
    edit_card(write_teacher(tmp_path / "teacher", 0.5), **changes)
    write_teacher(tmp_path / "intact", 0.25)
    states = {run.name: run.state for run in runs(RunsConfig(str(tmp_path)))}
    assert states.pop("intact") == "finished"
    assert [state[: len(reason or "")] for state in states.values()] == ([reason] if reason else [])


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"kind": "teacher"}'])
def test_card_that_is_no_json_is_damaged(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "card.json").write_bytes(raw)
    assert [run.state for run in find_runs(tmp_path)] == ["damaged: the card is invalid"]


def test_card_that_is_a_pipe_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    os.mkfifo(tmp_path / "teacher" / "card.json")
    assert find_runs(tmp_path)[0].state.startswith("damaged: ")


@pytest.mark.parametrize("output", [".", "/", "absent/runs.csv"])
def test_output_that_is_no_file_is_rejected(output: str) -> None:
    with pytest.raises(UserError, match="^output: "):
        RunsConfig(output=output)


def test_hidden_folders_and_links_are_skipped(tmp_path: Path) -> None:
    write_teacher(tmp_path / "runs" / "teacher", 0.5)
    write_teacher(tmp_path / "runs" / "teacher" / "inside", 0.9)
    write_teacher(tmp_path / "runs" / ".teacher.partial-1", 0.9)
    write_teacher(tmp_path / "elsewhere", 0.9)
    os.symlink(tmp_path, tmp_path / "runs" / "link")
    assert [run.name for run in find_runs(tmp_path / "runs")] == ["teacher"]


def test_control_characters_are_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_teacher(tmp_path / "[red]run", 0.5, recipe="[/] \x1b[2J")
    main(["teacher", "runs", "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "[red]run" in printed
    assert "[/] " in printed
    assert "\x1b[2J" not in printed
    assert "1:02:05" in printed


def test_table_is_written_as_csv(tmp_path: Path) -> None:
    write_teacher(tmp_path / "runs" / "a, b", 0.5)
    main(["teacher", "runs", "--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "table.csv")])
    with (tmp_path / "table.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["name"] == "a, b"
    assert float(row["val_recall_at_1"]) == 0.5
    assert row["state"] == "finished"


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent does not exist"):
        runs(RunsConfig(str(tmp_path / "absent")))
