"""Recall of nested prefixes against nested PCA, for students that are alike but for the nested losses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.figures import Figure, Row
from experiments.intervals import gain_text, interval_text, mean_text
from student.config import DistillConfig
from student.distill import distill
from student.model import load_student
from vpr.cli import read_config
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.retrieval.cut import cut_vectors
from vpr.retrieval.embeddings import embed, score_split, torch_forward
from vpr.retrieval.intervals import mean_interval, ratio_interval
from vpr.retrieval.projection import principal_rotation, project

log = get_logger(__name__)

Vectors = NDArray[np.float32]
SEEDS = (0, 1, 2)
DIMENSIONS = (8, 16, 32, 64, 128)
_GOAL_AT, _GOAL = 64, 0.97
PLAIN, PCA, NESTED, NESTED_PCA = "plain, first dimensions", "plain, nested PCA", "nested", "nested, nested PCA"


@dataclass(frozen=True)
class NestedSetting:
    """Students of one teacher with and without nested losses.

    Attributes:
        name: Name of the data set.
        teacher: Teacher artifact.
        catalog: Catalogue artifact with train, validation and test splits.
        folder: Folder of the artifacts; finished ones are reused, and a killed training resumes.
        command: Command that repeats the measurement.
        recipe: Recipe of the student.
        flags: More flags of ``vpr student distill``.
        dimensions: Nested dimensions.
        seeds: Seeds of the students.
    """

    name: str
    teacher: Path
    catalog: Path
    folder: Path
    command: str
    recipe: str = "sample"
    flags: tuple[str, ...] = ()
    dimensions: tuple[int, ...] = DIMENSIONS
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True)
class Embedded:
    """Embeddings of one student: (n, dim) of the test split, and (m, dim) of the training images for PCA."""

    test: Vectors
    training: Vectors

    @cached_property
    def rotated(self) -> Vectors:
        """Test embeddings in the principal directions of the training embeddings."""
        return project(torch.from_numpy(self.test), principal_rotation(self.training)).numpy()


def nested_figures(setting: NestedSetting) -> tuple[list[Figure], list[Row]]:
    """Distil with every seed, and score prefixes of the embeddings on the test split.

    PCA is fitted on the student's embeddings of the training images.

    Returns:
        Figures of the prefix of 64 dimensions and of the full width, and the table.
    """
    catalog = load_catalog(setting.catalog)
    hits, products = _score(setting, catalog)
    full = max(dim for _, dim in hits)
    rows = [_row(variant, dim, hits, products, full) for variant, dim in hits]
    at = _GOAL_AT if _GOAL_AT in setting.dimensions else setting.dimensions[0]
    nested, pca = hits[NESTED, at], hits[PCA, at]
    kept = float(nested.mean() / hits[NESTED, full].mean())
    interval = ratio_interval(nested, hits[NESTED, full], products)
    gain, loss = nested - pca, hits[NESTED, full] - hits[PLAIN, full]
    low, high = mean_interval(gain, products, lowest=-1) or (float("nan"), float("nan"))
    seeds, command, name, of = setting.seeds, setting.command, setting.name, f"{at} of {full} dimensions"
    figures = [
        Figure(
            f"{name}, nested student: recall@1 at {of} over the full width",
            kept,
            "",
            _GOAL,
            ">=",
            command,
            interval,
            seeds,
        ),
        Figure(
            f"{name}, nested student over nested PCA of the plain student: recall@1 at {of}, lower end of the interval",
            low,
            "",
            0.0,
            ">=",
            command,
            (low, high),
            seeds,
        ),
        Figure(
            f"{name}, nested student less the plain student: recall@1 at full width",
            float(loss.mean()),
            "",
            0.0,
            ">=",
            command,
            mean_interval(loss, products, lowest=-1),
            seeds,
        ),
    ]
    return figures, rows


def train_student(setting: NestedSetting, nested: bool, seed: int) -> Path:
    """Distil a student by the recipe; all share the cached views of the teacher."""
    name = f"{'nested' if nested else 'plain'}-seed{seed}"
    words = ["--recipe", setting.recipe, "--teacher", str(setting.teacher), "--catalog", str(setting.catalog)]
    words += ["--output", str(setting.folder / name), "--cache", str(setting.folder / "views"), "--seed", str(seed)]
    words += ["--losses.nested", *map(str, setting.dimensions)] if nested else []
    path = distill(read_config(DistillConfig, "student distill", [*words, *setting.flags]))
    assert path is not None
    return path


def _score(setting: NestedSetting, catalog: Catalog) -> tuple[dict[tuple[str, int], NDArray[Any]], NDArray[np.str_]]:
    """Return the (queries,) hits, mean over the seeds, by variant and dimensions, and the queries' products."""
    test, training = catalog.select(split="test"), catalog.select(split="train")
    by_seed: dict[tuple[str, int], list[NDArray[np.bool_]]] = {}
    products: NDArray[np.str_] = np.empty(0, dtype=np.str_)
    for seed in setting.seeds:
        for is_nested, names in ((False, (PLAIN, PCA)), (True, (NESTED, NESTED_PCA))):
            embedded = _embed(train_student(setting, is_nested, seed), test, training)
            full = embedded.test.shape[1]
            for name, vectors in zip(names, (embedded.test, embedded.rotated), strict=True):
                widths = (*setting.dimensions, *((full,) if vectors is embedded.test else ()))
                for dim in widths:
                    scores = score_split(test, cut_vectors(vectors, dim))
                    by_seed.setdefault((name, dim), []).append(scores.hits)
                    products = scores.products
    return {key: np.mean(hits, axis=0) for key, hits in by_seed.items()}, products


def _embed(path: Path, test: Catalog, training: Catalog) -> Embedded:
    student, artifact = load_student(path)
    assert artifact.card.preprocess is not None
    log.info(f"  scoring {path.name}")
    forward = torch_forward(student)
    return Embedded(*(embed(part, artifact.card.preprocess, forward) for part in (test, training)))


def _row(
    variant: str, dim: int, hits: dict[tuple[str, int], NDArray[Any]], products: NDArray[np.str_], full: int
) -> Row:
    own, plain = hits[variant, dim], hits[PLAIN, full]
    own_full = hits[NESTED if variant.startswith(NESTED) else PLAIN, full]
    pca = hits.get((PCA, dim), plain)  # all directions together are the embedding itself
    kept = interval_text(ratio_interval(own, own_full, products))
    return {
        "student": variant,
        "dimensions": dim,
        "recall@1 [95 %]": mean_text(own, products),
        "over its full width [95 %]": "1" if own is own_full else f"{own.mean() / own_full.mean():.3f}{kept}",
        "ahead of nested PCA by [95 %]": "" if own is pca else gain_text(own - pca, products, "+.3f"),
    }
