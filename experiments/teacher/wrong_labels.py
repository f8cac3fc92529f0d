"""Wrong labels that ``vpr catalog check`` finds among photographs, of which 5 % were moved to other products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.recall.baselines import colour_histogram
from experiments.figures import Figure, Row, command_of
from experiments.teacher.imagenet_weights import embed_untrained, find_checkpoint, imagenet_tower
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.retrieval.label_scores import LabelledVectors, find_neighbours, score_labels
from vpr.retrieval.metrics import average_precision

log = get_logger(__name__)

Vectors = NDArray[np.float32]
Labels = NDArray[np.int64]
SHARE = 0.05
SEEDS = (0, 1, 2)
GOAL = 0.8


def wrong_label_figures(catalog: Catalog, folder: Path) -> tuple[list[Figure], dict[str, list[Row]]]:
    """Return the average precision of each embedding, and its tables by seed.

    Neither embedding was trained on the photographs. ImageNet weights, written to ``folder``, are left out unless their
    package is installed.
    """
    _, truth = np.unique(catalog.products, return_inverse=True)
    command = command_of("teacher", "wrong-labels")
    figures, tables = [], {}
    for key, title, vectors in _embeddings(catalog, folder):
        rows = [find_injected(vectors, truth, seed) for seed in SEEDS]
        tables[f"wrong-labels-{key}"] = [
            {name: value if name == "seed" else f"{value:.3f}" for name, value in row.items()} for row in rows
        ]
        mean = float(np.mean([row["average precision"] for row in rows]))
        name = f"wrong labels, {SHARE:.0%} injected, {title}: average precision"
        figures.append(Figure(name, mean, "", GOAL, ">=", command, None, SEEDS))
        log.info(f"  {title}: average precision {mean:.3f}")
    return figures, tables


def inject(labels: Labels, seed: int) -> tuple[Labels, NDArray[np.bool_]]:
    """Move a share of the images to random other products; return the labels and the mask of the moved images."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(labels))[: round(SHARE * len(labels))]
    products = int(labels.max()) + 1
    moved = labels.copy()
    moved[rows] = (moved[rows] + rng.integers(1, products, len(rows))) % products
    return moved, moved != labels


def find_injected(vectors: Vectors, truth: Labels, seed: int) -> Row:
    """Return how well injected wrong labels are found: by the ranking of all images, and by the suggested moves."""
    labels, is_wrong = inject(truth, seed)
    scores = score_labels(LabelledVectors(vectors, labels), find_neighbours(vectors))
    order = np.argsort(scores.own - scores.other, kind="stable")
    found = scores.confident & is_wrong
    return {
        "seed": seed,
        "average precision": average_precision(np.flatnonzero(is_wrong[order])),
        "precision of suggested moves": found.sum() / max(1, scores.confident.sum()),
        "recall of suggested moves": found.sum() / is_wrong.sum(),
        "to the right product": (scores.product == truth)[found].mean(),
    }


def _embeddings(catalog: Catalog, folder: Path) -> Iterator[tuple[str, str, Vectors]]:
    """Yield key, title and vectors of each embedding."""
    yield "colour", "colour histogram", colour_histogram(catalog)
    if not find_checkpoint(0):
        log.warning("recorded figures of ImageNet weights stay: make photos-weights installs them")
        return
    log.info(f"embedding {len(catalog)} images with EfficientNet-Lite0 ...")
    yield "imagenet", "EfficientNet-Lite0 of ImageNet", embed_untrained(imagenet_tower(0, folder), catalog)
