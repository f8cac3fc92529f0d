"""``vpr teacher runs``: table of training runs, read from artifacts and run folders."""

import csv
import json
import math
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from teacher.config import RunsConfig
from vpr.artifacts.card import SCHEMA, Card, CorruptArtifact, read_card_file
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.run_folder import atomic_write, run_folder
from vpr.common.errors import UserError, printable
from vpr.common.log import get_logger
from vpr.training.callbacks import MONITOR

log = get_logger(__name__)

_RUN_MARK = ".run-"  # part of a run folder's name
_FILE_WIDTH = 180  # characters, for output that is not a terminal


@dataclass(frozen=True)
class Run:
    """Training run; unknown values are None. ``best_epoch`` counts from 1 over all stages.

    ``state`` is ``finished``, ``finished, leak``, ``unfinished at epoch n``, ``artifact gone`` or ``damaged: reason``.
    """

    name: str
    recipe: str | None = None
    stages: str | None = None
    loss: str | None = None
    seed: int | None = None
    val_recall_at_1: float | None = None
    best_epoch: int | None = None
    seconds: float | None = None
    images: int | None = None
    state: str = "finished"


def runs(config: RunsConfig) -> list[Run]:
    """List teachers and unfinished training runs, best validation recall@1 first; print and optionally write them.

    The weights of the teachers are not read or verified.
    """
    if not Path(config.folder).is_dir():
        raise UserError(f"folder: {config.folder} does not exist. Name the folder that holds the artifacts.")
    run_list = find_runs(Path(config.folder))
    run_list.sort(key=lambda run: (1.0 if run.val_recall_at_1 is None else -run.val_recall_at_1, run.name))
    _print(run_list)
    if config.output:
        _write(run_list, Path(config.output))
        log.info(f"{config.output}: {len(run_list)} training runs")
    return run_list


def find_runs(folder: Path) -> list[Run]:
    """Return the teachers and unfinished training runs below a folder, in the order of their paths."""
    teachers: list[Run] = []
    finished: set[Path] = set()
    run_folders: list[tuple[str, Path]] = []
    for path in _folders(folder):
        name = path.relative_to(folder).as_posix()
        if _RUN_MARK in path.name:
            run_folders.append((name, path))
            continue
        card = _read_teacher_card(path / CARD_NAME)
        if isinstance(card, str):
            teachers.append(Run(name, state=f"damaged: {card}"))
        elif card is not None:
            teachers.append(_finished_run(name, card))
            finished.add(run_folder(str(path), card.config, card.parents))
    unfinished = [_unfinished_run(name, path) for name, path in run_folders if path not in finished]
    return teachers + [run for run in unfinished if run]


def _folders(folder: Path) -> Iterator[Path]:
    """Yield artifacts and run folders without entering them; they may hold thousands of images."""
    for path, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if CARD_NAME in files or _RUN_MARK in Path(path).name:
            subfolders.clear()
            yield Path(path)


def _read_teacher_card(path: Path) -> Card | str | None:
    """Return a teacher's card, None for another kind of artifact, or the reason why it cannot be read."""
    try:
        raw = read_card_file(path)
        values = json.loads(raw)
        if values["kind"] != "teacher":
            return None
        if values["schema"] > SCHEMA:
            return "written by a newer version"
        return Card.model_validate_json(raw)
    except CorruptArtifact as error:
        return str(error)
    except OSError as error:
        return error.strerror or "the card cannot be read"
    except ValidationError as error:
        return f"invalid key '{'.'.join(map(str, error.errors()[0]['loc']))}' in the card"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "the card is invalid"


def _finished_run(name: str, card: Card) -> Run:
    config, metrics, catalog = card.config, card.metrics, card.catalog or {}
    try:
        seconds = _number(metrics.get("seconds"), float)
        return Run(
            name,
            **_settings(config),
            val_recall_at_1=_number(metrics.get(MONITOR), float),
            best_epoch=_number(metrics.get("best_epoch"), int),
            seconds=None if seconds is None else timedelta(seconds=seconds).total_seconds(),  # raises if too long
            images=_number(catalog.get("images", {}).get("train"), int),
            state="finished, leak" if catalog.get("leak") else "finished",
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return Run(name, state=f"damaged: invalid value in the card ({type(error).__name__}: {error})")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that come from a training's configuration."""
    stages = [(stage["train"], stage["epochs"]) for stage in config.get("stages", [])]
    return {
        "recipe": config.get("recipe") or None,
        "stages": " + ".join(f"{part} {epochs}" for part, epochs in stages) or None,
        "loss": " + ".join(_losses(config)) or None,
        "seed": _number(config.get("seed"), int),
    }


def _losses(config: dict[str, Any]) -> list[str]:
    """Return the losses of all stages, in the order of their first use."""
    names: list[str] = []
    for stage in config.get("stages") or [{}]:
        margin_weight = stage.get("margin_weight")
        margin_weight = config.get("margin_weight", 1.0) if margin_weight is None else margin_weight
        for section in ("head", "proxy", "pair"):
            values = stage.get(section) or config.get(section, {})
            weight = margin_weight if section == "head" else values.get("weight", 1.0)
            name = values.get("loss", "none")
            if weight and name not in ("none", *names):
                names.append(name)
    return names


def _number(value: Any, number_type: type[int] | type[float]) -> Any:
    return None if value is None else number_type(value)


def _unfinished_run(name: str, folder: Path) -> Run | None:
    """Return a run from its logs, or None if it has no stages (a student's, or one that has not started).

    Its recall is the best of the last validated stage, since that stage determines the teacher.
    """
    stages = [path for path in folder.glob("stage-*") if path.name.removeprefix("stage-").isdigit()]
    if not stages:
        return None
    before, best, best_epoch = 0, None, None
    for stage in sorted(stages, key=lambda path: int(path.name.removeprefix("stage-"))):
        recalls, epochs = _read_logs(stage)
        if recalls:
            best = max(recalls.values())
            best_epoch = before + min(epoch for epoch, recall in recalls.items() if recall == best)
        before += epochs
    # A finished training run deletes its checkpoints and keeps its logs.
    is_finished = before > 0 and not any(folder.glob("stage-*/last.ckpt"))
    state = "artifact gone" if is_finished else f"unfinished at epoch {before}"
    try:
        settings = _settings(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        settings = {}  # truncated by a kill
    return Run(name, **settings, val_recall_at_1=best, best_epoch=best_epoch, state=state)


def _read_logs(stage: Path) -> tuple[dict[int, float], int]:
    """Return validation recall@1 by epoch (from 1) and the number of finished epochs, over all starts of a stage."""
    recalls: dict[int, float] = {}
    finished = 0
    for path in stage.glob("csv-*/metrics.csv"):
        with path.open(newline="", encoding="utf-8", errors="replace") as stream:
            for row in csv.DictReader(stream):
                try:
                    epoch = int(row["epoch"]) + 1
                    recall = float(row.get(MONITOR) or "nan")
                except (KeyError, TypeError, ValueError):
                    continue  # a line truncated by a kill
                # Epoch means are logged at the end of an epoch.
                if math.isfinite(recall) or any(k and k.endswith("_epoch") and v for k, v in row.items()):
                    finished = max(finished, epoch)
                if math.isfinite(recall):
                    recalls[epoch] = max(recall, recalls.get(epoch, recall))
    return recalls, finished


def _print(run_list: list[Run]) -> None:
    table = Table(box=SIMPLE, padding=0)
    for name, min_width in (("name", 10), ("recipe", 6), ("stages", 6), ("loss", 4)):
        table.add_column(name, overflow="fold", min_width=min_width)
    for name in ("seed", "recall@1", "epoch", "time", "images"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold", min_width=9)
    for run in run_list:
        recall = None if run.val_recall_at_1 is None else f"{run.val_recall_at_1:.4f}"
        time = None if run.seconds is None else str(timedelta(seconds=round(run.seconds)))
        cells = (run.name, run.recipe, run.stages, run.loss, run.seed, recall, run.best_epoch, time, run.images)
        # `Text` shows markup in names as it is; `printable` keeps control characters from the terminal.
        table.add_row(*[Text(printable("–" if cell is None else str(cell))) for cell in (*cells, run.state)])
    (Console() if Console().is_terminal else Console(width=_FILE_WIDTH)).print(table)


def _write(run_list: list[Run], path: Path) -> None:
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([field.name for field in fields(Run)])
        writer.writerows(map(astuple, run_list))
