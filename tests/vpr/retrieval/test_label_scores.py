from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vpr.retrieval import label_scores
from vpr.retrieval.embeddings import l2_normalize
from vpr.retrieval.label_scores import LabelledVectors, find_neighbours, score_labels


def clusters(products: int, images: int, noise: float, seed: int = 0, dim: int = 32) -> LabelledVectors:
    """Return products as clusters around random directions, in random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(products), images))
    centres = rng.standard_normal((products, dim)) / np.sqrt(dim)
    vectors = centres[labels] + noise * rng.standard_normal((len(labels), dim)) / np.sqrt(dim)
    return LabelledVectors(l2_normalize(vectors.astype(np.float32)), labels)


def similarity(vector: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Return the similarity of an image to the images of a product, in float64."""
    centroid = others.sum(axis=0)
    nearest = np.sort(others @ vector)[::-1][:3].mean()
    return float((vector @ centroid / np.linalg.norm(centroid) + nearest) / 2)


@pytest.mark.parametrize("images", [2, 5])
def test_scores_equal_those_of_a_loop(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_scores, "_BLOCK", 7)
    monkeypatch.setattr(label_scores, "_SEARCHED", 11)
    data = clusters(9, images, 0.8)
    scores = score_labels(data, find_neighbours(data.vectors, len(data) - 1))
    vectors = data.vectors.astype(np.float64)
    own, best = np.empty(len(data)), np.empty((len(data), 9))
    for row, label in enumerate(data.labels):
        members = [np.flatnonzero((data.labels == product) & (np.arange(len(data)) != row)) for product in range(9)]
        values = [similarity(vectors[row], vectors[rows]) for rows in members]
        own[row], best[row] = values[label], values
        best[row, label] = -1
        assert scores.rest[row] == pytest.approx((vectors[members[label]] @ vectors[row]).mean(), abs=1e-5)
    np.testing.assert_allclose(scores.own, own, atol=1e-5)
    np.testing.assert_allclose(scores.other, best.max(axis=1), atol=1e-5)
    np.testing.assert_array_equal(scores.product, best.argmax(axis=1))
    confidence = np.array([own[data.labels == product].mean() for product in range(9)])
    expected = (best.max(axis=1) > own) & (best.max(axis=1) >= confidence[best.argmax(axis=1)])
    np.testing.assert_array_equal(scores.confident, expected)


def test_a_short_list_of_neighbours_finds_the_same_products() -> None:
    data = clusters(20, 12, 1.0)
    full = score_labels(data, find_neighbours(data.vectors, len(data) - 1))
    short = score_labels(data, find_neighbours(data.vectors))
    assert (full.product == short.product).mean() > 0.98
    assert np.abs(full.other - short.other).max() < 0.05


def test_neighbours_leave_the_image_out_even_among_many_copies() -> None:
    vectors = np.tile(clusters(1, 1, 0.1).vectors, (20, 1))
    near = find_neighbours(vectors, 5)
    assert near.rows.shape == (20, 5)
    assert not (near.rows == np.arange(20)[:, None]).any()
    assert all(len(set(row)) == 5 for row in near.rows.tolist())


def test_chance_is_the_mean_cosine_across_products() -> None:
    data = clusters(5, 4, 0.5)
    cosines = data.vectors.astype(np.float64) @ data.vectors.T
    assert data.chance == pytest.approx(cosines[data.labels[:, None] != data.labels].mean(), abs=1e-6)


def test_only_image_of_a_product_is_not_doubted() -> None:
    data = clusters(6, 3, 0.3)
    labels = data.labels.copy()
    labels[0] = 6
    scores = score_labels(LabelledVectors(data.vectors, labels), find_neighbours(data.vectors))
    assert np.isnan(scores.own[0])
    assert not scores.confident[0]
    assert np.isfinite(scores.own[1:]).all()
