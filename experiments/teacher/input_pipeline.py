"""Images per second that the input pipeline delivers, against those that training consumes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.figures import Figure, command_of
from teacher.config import ScheduledStage, StageConfig, TowerConfig
from teacher.model import build_teacher, read_tower
from teacher.module import TeacherModule
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import ImageDataset, training_loader
from vpr.imaging.augment import apply_views, draw_views
from vpr.imaging.config import ViewConfig
from vpr.imaging.decode import decode
from vpr.imaging.preprocess import Preprocess
from vpr.training.loop import best_precision

_BATCH, _PHONE_SIZE, _PHONE_IMAGES, _GRAIN = 128, (4000, 3000), 8, 8.0


def pipeline_figures(catalog: Path, seconds: float = 20.0) -> list[Figure]:
    """Measure images per second of two workers, of the sample tower's full step, and of reduced-scale decoding.

    Args:
        catalog: Catalogue artifact; its training split is read from files.
        seconds: Time of each measurement, after a warm-up.
    """
    training = load_catalog(catalog).select(split="train")
    tower = TowerConfig("sample", "")
    preprocess = build_teacher(tower, read_tower("sample"), False)[1]
    delivered = delivery_rate(training, preprocess, LoaderConfig(_BATCH, workers=2), seconds)
    consumed = consumption_rate(training, tower, _BATCH, seconds)
    full, reduced = decode_rates(preprocess.size)
    command = command_of("teacher", "pipeline")

    def rate(name: str, value: float) -> Figure:
        return Figure(name, round(value, 1), "images/s", None, ">=", command)

    return [
        rate("input pipeline: delivered by two workers (sample, 128 px WebP to 96 px)", delivered),
        rate("input pipeline: consumed by the sample tower's full training step", consumed),
        Figure("input pipeline: delivered over consumed", delivered / consumed, "times", 3, ">=", command),
        rate("12-megapixel JPEG, decoded in full, one thread", full),
        rate("12-megapixel JPEG, decoded at reduced scale, one thread", reduced),
    ]


def delivery_rate(training: Catalog, preprocess: Preprocess, config: LoaderConfig, seconds: float) -> float:
    """Return images per second of the training loader's workers, decoded from files."""
    loader = training_loader(ImageDataset(training, preprocess, views=[ViewConfig()]), config, 0)
    batches = _endless(loader)
    for _ in range(2 * max(1, loader.num_workers)):  # use up the batches prefetched during the start
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches)["rows"])
    return count / (time.perf_counter() - start)


def consumption_rate(training: Catalog, tower: TowerConfig, batch: int, seconds: float) -> float:
    """Return images per second of the full training step (views, forward, backward, optimiser) from memory."""
    stage = StageConfig("all", 1)
    teacher, preprocess = build_teacher(tower, read_tower(tower.name), False)
    scheduled = ScheduledStage(stage, 0, 1, ViewConfig(), 0)
    module = TeacherModule(scheduled, teacher, preprocess, training, training)
    module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    rows = torch.arange(min(batch, len(training)))
    pixels = ImageDataset(training, preprocess, views=[scheduled.views]).__getitems__(rows.tolist())["pixels"]
    is_bf16 = best_precision() == "bf16-mixed"

    def step(number: int) -> None:
        views = draw_views(scheduled.views, 0, rows, torch.full_like(rows, number))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            embeddings = module.teacher(module.normalise(apply_views(pixels, views, preprocess.size)))
            losses = module.head(embeddings, module.labels[rows], 0.0, 0)
        module.head.total(losses).backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(3):
        step(number)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step(steps)
        steps += 1
    return steps * len(rows) / (time.perf_counter() - start)


def decode_rates(size: int) -> tuple[float, float]:
    """Return images per second of decoding 12-megapixel JPEGs in one thread: in full, and at reduced scale."""
    preprocess = Preprocess(size=size)
    rng = np.random.default_rng(0)
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.jpg" for number in range(_PHONE_IMAGES)]
        for path in paths:
            coarse = Image.fromarray(rng.integers(0, 256, (150, 200, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize(_PHONE_SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
            # Sensor noise makes up most of a phone's JPEG.
            grain = rng.standard_normal(smooth.shape, dtype=np.float32) * _GRAIN
            Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        for shortest in (None, size):
            start = time.perf_counter()
            for path in paths:
                preprocess.pixels(decode(path, shortest=shortest))
            rates.append(len(paths) / (time.perf_counter() - start))
    return rates[0], rates[1]


def _endless(loader: DataLoader[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from loader
