"""Teacher and student of the demo with the views of today, and with views cut as they were before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from app.demo import steps
from benchmarks.config import RecallConfig
from benchmarks.recall.measure import measure_recall
from experiments.figures import Figure, Row
from experiments.intervals import gain_text, mean_text
from vpr.cli import run
from vpr.common.log import get_logger
from vpr.imaging.config import ViewConfig
from vpr.retrieval.intervals import mean_interval

log = get_logger(__name__)

_STEPS = ("catalogue", "teacher", "student")
_MODELS = ("teacher", "student")


@contextmanager
def blurred_views() -> Iterator[None]:
    """Cut views as before: bilinearly, from images that are decoded at the side of a view."""
    sample = F.grid_sample

    def bilinear(pixels: Tensor, grid: Tensor, mode: str, **options: Any) -> Tensor:
        return sample(pixels, grid, "bilinear" if mode == "bicubic" else mode, **options)

    with (
        patch.object(ViewConfig, "decoded_side", lambda config, size: size),
        patch.object(ViewConfig, "derived_values", lambda config: {}),
        patch.object(F, "grid_sample", bilinear),
    ):
        yield


def train_with(folder: Path, seed: int) -> dict[str, dict[str, str]]:
    """Train teacher and student of the demo with a seed; return their hits by product. Finished steps are kept."""
    pipeline = {step.name: step for step in steps(str(folder), full=False)}
    for name in _STEPS:
        log.info(f"{folder.name}, seed {seed}: {name}")
        run((*pipeline[name].arguments, *(("--seed", str(seed)) if name != "catalogue" else ())))
    models = tuple(str(folder / name) for name in _MODELS)
    table = measure_recall(RecallConfig(str(folder / "catalog"), models, str(folder / "recall-views")))
    rows = json.loads((table / "recall.json").read_text(encoding="utf-8"))
    return {row["name"]: row["hits"] for row in rows if row["name"] in _MODELS}


def compare_views(demo: Path, seeds: tuple[int, ...], command: str) -> tuple[list[Figure], list[Row]]:
    """Return figures and rows of recall@1 with both kinds of views, averaged over the seeds, with product intervals."""
    now, before = [], []
    for seed in seeds:
        now.append(train_with(demo if seed == 0 else demo.with_name(f"demo-seed-{seed}"), seed))
        with blurred_views():
            before.append(train_with(demo.with_name(f"demo-blurred-{seed}"), seed))
    figures: list[Figure] = []
    rows: list[Row] = []
    for model in _MODELS:
        names = list(now[0][model])
        products = np.repeat(names, [len(now[0][model][name]) for name in names])
        sharp, blurred = (
            np.mean([[int(digit) for name in names for digit in hits[model][name]] for hits in arm], axis=0)
            for arm in (now, before)
        )
        gain = sharp - blurred
        interval = mean_interval(gain, products, lowest=-1)
        assert interval is not None
        name = f"{model} of the sample, views of today over views before, recall@1: upper end of the interval"
        figures.append(Figure(name, round(interval[1], 4), "", 0.0, ">=", command, None, seeds))
        rows.append(
            {
                "model": model,
                "views of today": mean_text(sharp, products),
                "views before": mean_text(blurred, products),
                "gain [95 %]": gain_text(gain, products, "+.3f", blurred),
            }
        )
    return figures, rows
