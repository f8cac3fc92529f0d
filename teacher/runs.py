"""``vpr teacher runs``: the experiment table, read from what trainings leave behind."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from teacher.config import RunsConfig
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.run_folder import atomic_write, run_folder
from vpr.artifacts.store import SCHEMA, Card, CorruptArtifact, read_card_file
from vpr.common.errors import UserError, printable
from vpr.common.log import get_logger
from vpr.training.callbacks import MONITOR

log = get_logger(__name__)

_RUN = ".run-"
_FILE_WIDTH = 180


@dataclass(frozen=True)
class Run:
    """One line of the table; None is what is not known.

    Attributes:
        name: path below the folder.
        recipe: its name.
        stages: what was trained, with epochs.
        loss: of the head.
        seed: of the training.
        val_recall_at_1: best on the validation split.
        best_epoch: that reached it, from 1 over all stages.
        seconds: of training.
        images: in the training split.
        state: ``finished``, ``finished, leak``, ``unfinished at epoch n``, ``artifact gone`` or ``damaged: why``.
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
    """List teachers and unfinished runs, best validation recall@1 first; print them, and write them as CSV.

    Cards are read without verifying the weights beside them.
    """
    if not Path(config.folder).is_dir():
        raise UserError(f"folder: {config.folder}: no such folder: give the one that holds the artifacts")
    found = find_runs(Path(config.folder))
    found.sort(key=lambda run: (1.0 if run.val_recall_at_1 is None else -run.val_recall_at_1, run.name))
    _print(found)
    if config.output:
        _write(found, Path(config.output))
        log.info(f"{config.output}: {len(found)} runs")
    return found


def find_runs(folder: Path) -> list[Run]:
    """Teachers and runs below a folder, in the order of their paths."""
    found, finished, logged = [], set(), []
    for path in _folders(folder):
        name = path.relative_to(folder).as_posix()
        if _RUN in path.name:
            logged.append((name, path))
            continue
        card = _read(path / CARD_NAME)
        if isinstance(card, str):
            found.append(Run(name, state=f"damaged: {card}"))
        elif card is not None:
            found.append(_finished(name, card))
            finished.add(run_folder(str(path), card.config, card.parents))
    return found + [run for name, path in logged if path not in finished and (run := _unfinished(name, path))]


def _folders(folder: Path) -> Iterator[Path]:
    """Artifacts and run folders; what lies inside them (images by the thousand) is not looked at."""
    for path, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if CARD_NAME in files or _RUN in Path(path).name:
            below.clear()
            yield Path(path)


def _read(path: Path) -> Card | str | None:
    """A teacher's card, None for another kind's, or why it cannot be read."""
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
        return error.strerror or "its card cannot be read"
    except ValidationError as error:
        return f"key '{'.'.join(map(str, error.errors()[0]['loc']))}' of its card"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its card is no card"


def _finished(name: str, card: Card) -> Run:
    config, metrics, catalog = card.config, card.metrics, card.catalog or {}
    try:
        return Run(
            name,
            **_planned(config),
            val_recall_at_1=_number(metrics.get(MONITOR), float),
            best_epoch=_number(metrics.get("best_epoch"), int),
            seconds=_seconds(metrics.get("seconds")),
            images=_number(catalog.get("images", {}).get("train"), int),
            state="finished, leak" if catalog.get("leak") else "finished",
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return Run(name, state=f"damaged: its card's values ({type(error).__name__}: {error})")


def _planned(config: dict[str, Any]) -> dict[str, Any]:
    """What a training's configuration tells of a run."""
    stages = [(stage["train"], stage["epochs"]) for stage in config.get("stages", [])]
    return {
        "recipe": config.get("recipe") or None,
        "stages": " + ".join(f"{part} {epochs}" for part, epochs in stages) or None,
        "loss": config.get("head", {}).get("loss"),
        "seed": _number(config.get("seed"), int),
    }


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    return None if value is None else kind(value)


def _seconds(value: Any) -> float | None:
    """A duration; what :class:`timedelta` cannot hold is none."""
    return None if value is None else timedelta(seconds=float(value)).total_seconds()


def _unfinished(name: str, folder: Path) -> Run | None:
    """What the logs of a run tell, or None where it has no stages (a student's, or nothing began).

    The recall is the best of the last stage that was validated, as it will be the teacher's.
    """
    stages = [path for path in folder.glob("stage-*") if path.name.removeprefix("stage-").isdigit()]
    before, best, best_epoch = 0, None, None
    for stage in sorted(stages, key=lambda path: int(path.name.removeprefix("stage-"))):
        recalls, epochs = _logged(stage)
        if recalls:
            best = max(recalls.values())
            best_epoch = before + min(epoch for epoch, recall in recalls.items() if recall == best)
        before += epochs
    # A run's checkpoints go when it finishes, its logs stay.
    ended = before > 0 and not any(folder.glob("stage-*/last.ckpt"))
    state = "artifact gone" if ended else f"unfinished at epoch {before}"
    if not stages:
        return None
    try:
        planned = _planned(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        planned = {}  # cut off by a kill
    return Run(name, **planned, val_recall_at_1=best, best_epoch=best_epoch, state=state)


def _logged(stage: Path) -> tuple[dict[int, float], int]:
    """Validation recall@1 by epoch from 1, and the epochs that ended, over all the times a stage was started."""
    recalls: dict[int, float] = {}
    ended = 0
    for log in stage.glob("csv-*/metrics.csv"):
        with log.open(newline="", encoding="utf-8", errors="replace") as stream:
            for row in csv.DictReader(stream):
                try:
                    epoch = int(row["epoch"]) + 1
                    recall = float(row.get(MONITOR) or "nan")
                except (KeyError, TypeError, ValueError):
                    continue  # the line that a kill cut off
                # Losses are averaged over the epoch when it ends.
                if math.isfinite(recall) or any(k and k.endswith("_epoch") and v for k, v in row.items()):
                    ended = max(ended, epoch)
                if math.isfinite(recall):
                    recalls[epoch] = max(recall, recalls.get(epoch, recall))
    return recalls, ended


def _print(found: list[Run]) -> None:
    table = Table(box=SIMPLE, padding=0)
    for name, least in (("name", 10), ("recipe", 6), ("stages", 6), ("loss", 4)):
        table.add_column(name, overflow="fold", min_width=least)
    for name in ("seed", "recall@1", "epoch", "time", "images"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold", min_width=9)
    for run in found:
        recall = None if run.val_recall_at_1 is None else f"{run.val_recall_at_1:.4f}"
        spent = None if run.seconds is None else str(timedelta(seconds=round(run.seconds)))
        shown = (run.name, run.recipe, run.stages, run.loss, run.seed, recall, run.best_epoch, spent, run.images)
        # As text, names are shown as they are, not read as markup; control characters would reach the terminal.
        table.add_row(*[Text(printable("–" if value is None else str(value))) for value in (*shown, run.state)])
    # A file or a pipe has no width to keep to.
    (Console() if Console().is_terminal else Console(width=_FILE_WIDTH)).print(table)


def _write(found: list[Run], path: Path) -> None:
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([field.name for field in fields(Run)])
        writer.writerows([[getattr(run, field.name) for field in fields(Run)] for run in found])
