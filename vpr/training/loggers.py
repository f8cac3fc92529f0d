"""Loggers of a training run: CSV, TensorBoard and an optional tracking service."""

import importlib.util
import os
import shutil
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from vpr.common.errors import UserError


def check_tracker(tracker: str) -> None:
    """Raise :class:`UserError` if the tracker's package is not installed."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise UserError(f"run.tracker: {tracker} is not installed. Run `pip install {tracker}` or set it to none.")


def open_logs(folder: Path, tracker: str) -> list[Logger]:
    """Return the loggers of a training run; each start and each resume has its own CSV."""
    check_tracker(tracker)
    folder.mkdir(parents=True, exist_ok=True)
    csv_log = CSVLogger(folder, name="", version=f"csv-{len(_csv_logs(folder))}")
    logs: list[Logger] = [csv_log, TensorBoardLogger(folder, name="", version="tb")]
    if tracker == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        logs.append(WandbLogger(name=folder.name, save_dir=folder, project="vpr"))
    if tracker == "mlflow":
        from lightning.pytorch.loggers import MLFlowLogger

        server = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute()}/mlflow.db")
        logs.append(MLFlowLogger("vpr", folder.name, tracking_uri=server))
    return logs


def copy_logs(folder: Path, destination: Path, name: str = "metrics") -> None:
    """Copy CSV logs into an artifact as ``<name>.csv``, ``<name>-resumed-1.csv`` and so on."""
    for number, log in enumerate(_csv_logs(folder)):
        shutil.copyfile(log, destination / (f"{name}-resumed-{number}.csv" if number else f"{name}.csv"))


def _csv_logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("csv-*/metrics.csv"), key=lambda path: int(path.parent.name.removeprefix("csv-")))
