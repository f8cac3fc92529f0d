"""Scores of photographs with one photograph of each product in the gallery."""

from __future__ import annotations

import numpy as np

from experiments.teacher.photo_scores import _score_one
from vpr.retrieval.metrics import evaluate


def test_one_photograph_of_each_product() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(30, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    products = np.array([f"product-{row % 5}" for row in range(30)])
    queries, gallery, of_queries, of_gallery = vectors[:20], vectors[20:], products[:20], products[20:]
    # With one photograph of each product, every draw is this gallery.
    single = _score_one(queries, of_queries, gallery[:5], of_gallery[:5])
    np.testing.assert_array_equal(single, evaluate(queries, of_queries, gallery[:5], of_gallery[:5]).hits)
    # With two, the share approaches the mean over all galleries.
    found = _score_one(queries, of_queries, gallery, of_gallery)
    choices = np.stack(np.meshgrid(*[[0, 5]] * 5), -1).reshape(-1, 5) + np.arange(5)
    expected = np.mean(
        [evaluate(queries, of_queries, gallery[rows], of_gallery[rows]).hits for rows in choices], axis=0
    )
    assert np.abs(found - expected).max() < 0.2
    assert 0 < expected.mean() < 1
