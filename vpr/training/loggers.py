"""Where a training logs to: CSV and TensorBoard, and a service that was asked for."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from vpr.common.errors import UserError


def check_tracker(tracker: str) -> None:
    """Refuse a tracker whose package is not installed."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise UserError(f"run.tracker: {tracker} is not installed: pip install {tracker}, or set it to none")


def open_logs(folder: Path, tracker: str) -> list[Logger]:
    """Loggers of a run in its folder; each time that it is started has a CSV of its own."""
    check_tracker(tracker)
    folder.mkdir(parents=True, exist_ok=True)
    logs: list[Logger] = [
        CSVLogger(folder, name="", version=f"csv-{len(_csv_logs(folder))}"),
        TensorBoardLogger(folder, name="", version="tb"),
    ]
    if tracker == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        logs.append(WandbLogger(name=folder.name, save_dir=folder, project="vpr"))
    if tracker == "mlflow":
        from lightning.pytorch.loggers import MLFlowLogger

        server = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute()}/mlflow.db")
        logs.append(MLFlowLogger("vpr", folder.name, tracking_uri=server))
    return logs


def copy_logs(folder: Path, destination: Path, name: str = "metrics") -> None:
    """Put a run's CSV logs into an artifact: ``<name>.csv``, and one more for each time it was resumed."""
    for number, log in enumerate(_csv_logs(folder)):
        shutil.copyfile(log, destination / (f"{name}-resumed-{number}.csv" if number else f"{name}.csv"))


def _csv_logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("csv-*/metrics.csv"), key=lambda path: int(path.parent.name.removeprefix("csv-")))
