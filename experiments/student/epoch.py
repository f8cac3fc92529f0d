"""Cost of a distillation epoch over the student's forward and backward passes on images in memory."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.figures import Figure
from student.config import DistillConfig
from student.criterion import DistillationLoss, Labels
from student.losses import cosine_loss
from student.model import Student
from student.module import StudentModule
from student.targets import CachedTargets
from student.teacher_cache import build_teacher_cache
from student.teacher_model import load_teacher_model
from vpr.artifacts.store import load_artifact
from vpr.data.catalog import load_catalog
from vpr.data.loaders import ImageDataset, training_loader, validation_loader
from vpr.training.config import RunConfig
from vpr.training.loop import best_precision, fit

Loader = DataLoader[dict[str, Tensor]]
_EPOCHS = 5  # the first warms up, the last validates


class TimedModule(StudentModule):
    """Training module that times its epochs, and the bare passes of as many batches before each of them."""

    batches: int
    starts: list[float]
    ends: list[float]
    passes: list[float]

    def on_train_epoch_start(self) -> None:
        """End the last epoch and time the bare passes. Drawing the bank is part of the epoch."""
        self.ends.append(time.perf_counter())
        self.passes.append(time_passes(self.config, self.config.loader.batch_size, self.batches))
        self.starts.append(time.perf_counter())
        super().on_train_epoch_start()

    def pairs(self) -> list[tuple[float, float]]:
        """Return the seconds of each epoch between the first and the last, and those of the passes around it."""
        return [
            (self.ends[i + 1] - self.starts[i], statistics.mean(self.passes[i : i + 2])) for i in range(1, _EPOCHS - 1)
        ]


def epoch_figures(config: DistillConfig, folder: Path, command: str, goal: float | None = 1.10) -> list[Figure]:
    """Measure the seconds of an epoch (images in memory, cached targets) over those of the bare passes.

    Passes are timed before and after every epoch, because the speed of a machine may drift. The median of three ratios
    counts.

    Args:
        config: Distillation.
        folder: Folder of the cache and the training run.
        command: Command that repeats the measurement.
        goal: Goal of the ratio.
    """
    module, loaders = _training(config, folder)
    batches, batch = len(loaders[0]), config.loader.batch_size
    module.batches = batches
    fit(module, loaders, module.student, folder / "run", _EPOCHS, RunConfig(validate_every=_EPOCHS))
    epoch, passes = sorted(module.pairs(), key=lambda pair: pair[0] / pair[1])[(_EPOCHS - 2) // 2]
    name = f"{config.model.image_size} pixels, {config.model.dim} wide"
    return [
        Figure(f"epoch of {batches * batch} images, cached signal ({name})", epoch, "s", None, "<=", command),
        Figure(f"the student's own forward and backward passes of them ({name})", passes, "s", None, "<=", command),
        Figure(f"an epoch over the student's own passes ({name})", epoch / passes, "times", goal, "<=", command),
    ]


def _training(config: DistillConfig, folder: Path) -> tuple[TimedModule, tuple[Loader, Loader]]:
    """Cache the targets, and return a new student's module with its training and validation loaders."""
    catalog = load_catalog(config.catalog)
    training, validation = catalog.select(split="train"), catalog.select(split="validation")
    teacher = load_teacher_model(load_artifact(config.teacher[0], "teacher"))
    path = config.cache or str(folder / "views")
    cache = build_teacher_cache(path, teacher, training, config.views, config.targets, config.view_seed)
    preprocess = teacher.preprocess.model_copy(update={"size": config.model.image_size})
    student = Student(config.model)
    loss = DistillationLoss(config.losses, student, Labels(training), teacher.dim)
    targets = CachedTargets(cache, config.targets, None, config.seed)
    module = TimedModule(config, student, loss, targets, preprocess, validation)
    module.starts, module.ends, module.passes = [], [], []
    return module, (
        training_loader(ImageDataset(training, preprocess, True, [config.views]), config.loader, config.seed),
        validation_loader(ImageDataset(validation, preprocess), config.loader),
    )


def time_passes(config: DistillConfig, batch: int, batches: int) -> float:
    """Return the seconds of forward and backward passes of batches in memory, in the training's precision."""
    size = config.model.image_size
    student = Student(config.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    teacher = torch.nn.functional.normalize(torch.randn(batch, config.model.embedding_dim), dim=1)

    def step() -> None:
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=best_precision() == "bf16-mixed"):
            embeddings = student(x)
        cosine_loss(embeddings, teacher).backward()

    for _ in range(3):
        step()
    start = time.perf_counter()
    for _ in range(batches):
        step()
    return time.perf_counter() - start
