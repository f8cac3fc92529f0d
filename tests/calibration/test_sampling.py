from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from calibration.sampling import k_centre, select_images
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog


def test_stratified_takes_products_in_turn(catalog: Catalog) -> None:
    training = catalog.select(split="train")
    for count in (8, 20, 64):
        rows = select_images(training, count, seed=0)
        assert len(set(rows.tolist())) == count
        counts = Counter(training.products[rows].tolist())
        assert len(counts) == 8
        assert max(counts.values()) - min(counts.values()) <= 1


def test_seed_determines_selection(catalog: Catalog) -> None:
    training = catalog.select(split="train")
    assert select_images(training, 20, 0).tolist() == select_images(training, 20, 0).tolist()
    assert select_images(training, 20, 0).tolist() != select_images(training, 20, 1).tolist()


def test_scored_split_and_large_count_are_rejected(catalog: Catalog) -> None:
    with pytest.raises(UserError, match="images of the test split are scored later"):
        select_images(catalog.select(split="test"), 4, 0)
    with pytest.raises(UserError, match="count: expected 1 to 64"):
        select_images(catalog.select(split="train"), 10_000, 0)


def test_random_selects_uniformly_without_replacement(catalog: Catalog) -> None:
    training = catalog.select(split="train")
    drawn = [select_images(training, 16, seed, "random") for seed in range(300)]
    assert all(len(set(rows.tolist())) == 16 for rows in drawn)
    share = np.bincount(np.concatenate(drawn), minlength=len(training)) / len(drawn)
    # 16 of 64 each time: a quarter, with a standard error of .025.
    assert share.min() > 0.25 - 5 * 0.025
    assert share.max() < 0.25 + 5 * 0.025


def test_k_centre_is_within_twice_the_optimum() -> None:
    """Gonzalez's bound on the radius, against all selections of 3 of 9 points."""
    from itertools import combinations

    def radius(vectors: np.ndarray, selected: list[int]) -> float:
        return float(np.linalg.norm(vectors[:, None] - vectors[None, selected], axis=2).min(axis=1).max())

    for seed in range(20):
        vectors = np.random.default_rng(seed).normal(size=(9, 2)).astype(np.float32)
        selected = k_centre(vectors, 3).tolist()
        assert len(set(selected)) == 3
        best = min(radius(vectors, list(rows)) for rows in combinations(range(9), 3))
        assert radius(vectors, selected) <= 2 * best + 1e-6


def test_k_centre_covers_clusters_and_accepts_copies(catalog: Catalog) -> None:
    training = catalog.select(split="train")
    corners = np.eye(8, dtype=np.float32)[np.unique(training.products, return_inverse=True)[1]]
    rows = select_images(training, 8, 0, "k-centre", lambda pool: corners[pool])
    assert len(set(training.products[rows].tolist())) == 8
    same = select_images(training, 12, 0, "k-centre", lambda pool: np.ones((len(pool), 4), np.float32))
    assert len(set(same.tolist())) == 12


def test_evaluation_image_is_rejected(catalog: Catalog) -> None:
    training = catalog.select(split="train")
    scored = Catalog(training.table.slice(3, 2), training.root, training.artifact)
    with pytest.raises(UserError, match="trained and scored"):
        select_images(training, len(training), 0, evaluation=scored)
    assert len(select_images(training, 4, 0, evaluation=catalog.select(split="test"))) == 4
