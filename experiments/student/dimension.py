"""Recall lost by projecting the embeddings of a teacher with a known spectrum."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.figures import Figure, Row
from student.config import DimensionConfig
from student.projection import fit_projection
from vpr.retrieval.embeddings import l2_normalize
from vpr.retrieval.intervals import mean_interval
from vpr.retrieval.metrics import evaluate
from vpr.retrieval.projection import project

Vectors = NDArray[np.float32]
_FROM, _TO, _FITTED, _SCORED, _VIEWS = 1024, 256, 4096, 2000, 2
# Eigenvalues fall as k^-decay. Noise is the view's share of the variance, low enough for a high recall at full length.
SPECTRA = {"k^-0.5": (0.5, 0.8), "k^-1": (1.0, 0.5), "k^-1.5": (1.5, 0.2)}


def dimension_figures(command: str, seeds: tuple[int, ...] = (0, 1)) -> tuple[list[Figure], list[Row]]:
    """Measure recall@1 at full length, after PCA and after the learned projection, on products of no fit.

    Returns:
        Figures of the gain of the learned projection over PCA, and the table.
    """
    figures, rows = [], []
    for name, (decay, noise) in SPECTRA.items():
        hits: dict[str, list[NDArray[np.bool_]]] = {"full": [], "pca": [], "cosine": []}
        for seed in seeds:
            fitted, scored, products = synthetic_teacher(decay, noise, seed)
            hits["full"].append(_hits(scored, products))
            for method in ("pca", "cosine"):
                projection = fit_projection(DimensionConfig(method), fitted, _TO, seed)  # type: ignore[arg-type]
                hits[method].append(_hits(project(torch.from_numpy(scored), projection).numpy(), products))
        mean = {method: np.mean(by_seed, axis=0) for method, by_seed in hits.items()}
        gain = mean["cosine"] - mean["pca"]
        title = f"{_FROM} to {_TO}, spectrum {name}: cosine-preserving compression less PCA, recall@1"
        interval = mean_interval(gain, products[::2], lowest=-1)
        figures.append(Figure(title, float(gain.mean()), "", 0.0, ">=", command, interval, seeds))
        texts = {method: f"{value.mean():.3f}" for method, value in mean.items()}
        rows.append({"spectrum": name, f"{_FROM} dimensions": texts["full"], **_named(texts)})
    return figures, rows


def synthetic_teacher(decay: float, noise: float, seed: int) -> tuple[Vectors, Vectors, NDArray[np.str_]]:
    """Return unit vectors of views of products; their covariance has eigenvalues k^-decay in random directions.

    Args:
        decay: Decay of the spectrum.
        noise: Share of the variance that differs between the views of a product.
        seed: Seed of directions and vectors.

    Returns:
        Vectors to fit on; vectors of other products to score, views of a product adjacent; and their products.
    """
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((_FROM, _FROM)))[0]
    scale = np.arange(1, _FROM + 1) ** (-decay / 2)

    def views(products: int) -> Vectors:
        centres = np.repeat(rng.standard_normal((products, _FROM)), _VIEWS, axis=0)
        view_noise = rng.standard_normal((products * _VIEWS, _FROM))
        mixed = (np.sqrt(1 - noise) * centres + np.sqrt(noise) * view_noise) * scale
        return l2_normalize((mixed @ rotation).astype(np.float32))

    return views(_FITTED), views(_SCORED), np.repeat(np.arange(_SCORED).astype(str), _VIEWS)


def _hits(vectors: Vectors, products: NDArray[np.str_]) -> NDArray[np.bool_]:
    return evaluate(vectors[::2], products[::2], vectors[1::2], products[1::2]).hits


def _named(texts: dict[str, str]) -> Row:
    return {f"{_TO} by PCA": texts["pca"], f"{_TO} by cosine-preserving compression": texts["cosine"]}
