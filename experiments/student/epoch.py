"""What an epoch of distillation costs over the student's own forward and backward passes on images in memory."""

from __future__ import annotations

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
_EPOCHS = 4  # the first warms up, the last has a validation


class TimedModule(StudentModule):
    """The training's own module, which notes when its epochs begin."""

    begun: list[float]

    def on_train_epoch_start(self) -> None:
        """Note the time; the bank that is drawn now is part of this epoch."""
        self.begun.append(time.perf_counter())
        super().on_train_epoch_start()


def epoch_figures(config: DistillConfig, folder: Path, command: str, goal: float | None = 1.15) -> list[Figure]:
    """Seconds of whole epochs as they are trained (images in memory, cached signal), over those of the passes.

    Args:
        config: the distillation.
        folder: of the cache and the run.
        command: that measures this again.
        goal: for the ratio.
    """
    module, loaders = _training(config, folder)
    batches, batch = len(loaders[0]), config.loader.batch_size
    before = passes(config, batch, batches)
    fit(module, loaders, module.student, folder / "run", _EPOCHS, RunConfig(validate_every=_EPOCHS))
    after = passes(config, batch, batches)
    epoch = min(later - begun for begun, later in zip(module.begun[1:], module.begun[2:], strict=False))
    own = min(before, after)
    name = f"{config.model.image_size} pixels, {config.model.dim} wide"
    return [
        Figure(f"epoch of {batches * batch} images, cached signal ({name})", epoch, "s", None, "<=", command),
        Figure(f"the student's own forward and backward passes of them ({name})", own, "s", None, "<=", command),
        Figure(f"an epoch over the student's own passes ({name})", epoch / own, "times", goal, "<=", command),
    ]


def _training(config: DistillConfig, folder: Path) -> tuple[TimedModule, tuple[Loader, Loader]]:
    """A new student's module, and its loaders of the training and the validation split; caches the signal first."""
    catalog = load_catalog(config.catalog)
    training, validation = catalog.select(split="train"), catalog.select(split="validation")
    source = load_teacher_model(load_artifact(config.teacher, "teacher"))
    path = config.cache or str(folder / "views")
    signal = build_teacher_cache(path, source, training, config.views, config.targets, config.seed)
    preprocess = source.preprocess.model_copy(update={"size": config.model.image_size})
    student = Student(config.model)
    objective = DistillationLoss(config.losses, student, Labels(training), source.dim)
    targets = CachedTargets(signal, config.targets, None, config.seed)
    module = TimedModule(config, student, objective, targets, preprocess, validation)
    module.begun = []
    return module, (
        training_loader(ImageDataset(training, preprocess, True), config.loader, config.seed),
        validation_loader(ImageDataset(validation, preprocess), config.loader),
    )


def passes(config: DistillConfig, batch: int, batches: int) -> float:
    """Seconds of forward and backward passes of so many batches that lie in memory, in the training's precision."""
    size = config.model.image_size
    student = Student(config.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    teacher = torch.nn.functional.normalize(torch.randn(batch, config.model.embedding_dim), dim=1)

    def step() -> None:
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=best_precision() == "bf16-mixed"):
            found = student(x)
        cosine_loss(found, teacher).backward()

    for _ in range(3):
        step()
    begun = time.perf_counter()
    for _ in range(batches):
        step()
    return time.perf_counter() - begun
