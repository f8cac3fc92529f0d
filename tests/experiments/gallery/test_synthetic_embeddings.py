from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.gallery.embedding_statistics import measure_statistics
from experiments.gallery.real_embeddings import synthetic_images
from experiments.gallery.synthetic_embeddings import (
    SyntheticProducts,
    SyntheticSource,
    write_synthetic_distractors,
    write_synthetic_embeddings,
)
from vpr.common.errors import UserError
from vpr.retrieval.embeddings import load_embeddings

MADE = SyntheticProducts(
    dim=96, categories=40, common=0.1, category=0.25, gallery_noise=0.15, query_noise=0.4, noise_spread=0.5, head=6,
    decay=1.3,
)  # fmt: skip


def test_shares_are_those_asked_for() -> None:
    """Images of one role: the mean cosines equal the shares; their noise varies as asked for."""
    measured = measure_statistics(synthetic_images(MADE, 800, ("gallery",) * 6))
    assert measured.common == pytest.approx(0.1, abs=0.02)
    assert measured.category == pytest.approx(0.25, abs=0.03)
    assert measured.product == pytest.approx(0.5, abs=0.03)
    assert measured.gallery_noise == pytest.approx(0.15, abs=0.01)
    assert measured.noise_spread == pytest.approx(0.5, abs=0.1)


def test_spectrum_is_that_asked_for() -> None:
    """Directions of length 1 keep the decay; without a common part the participation ratio has a closed form."""
    images = synthetic_images(replace(MADE, common=0.0, category=0.0), 1500, ("gallery", "gallery"))
    measured = measure_statistics(images)
    assert measured.decay == pytest.approx(1.3, abs=0.12)
    variances = np.maximum(np.arange(1, 97), 6.0) ** -1.3
    assert measured.effective_dims == pytest.approx(variances.sum() ** 2 / (variances**2).sum(), rel=0.15)


def test_queries_differ_more_than_gallery_images() -> None:
    made = replace(MADE, noise_spread=0.0)
    images = synthetic_images(made, 500, ("query",) * 3 + ("gallery",) * 3)
    measured = measure_statistics(images)
    assert measured.query_noise == pytest.approx(0.4, abs=0.02)
    by_product = images.vectors.reshape(500, 6, 96)
    across = np.einsum("pqd,pgd->pqg", by_product[:, :3], by_product[:, 3:]).mean()
    assert across == pytest.approx(np.sqrt(0.6 * 0.85), abs=0.02)


def test_more_noise_finds_fewer_products() -> None:
    recalls = [
        measure_statistics(
            synthetic_images(replace(MADE, query_noise=noise), 300, ("query",) * 2 + ("gallery",) * 2)
        ).recall_at_1
        for noise in (0.2, 0.4, 0.6)
    ]
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] > recalls[2] + 0.1


def test_products_are_equal_for_every_number_and_independent_in_every_group() -> None:
    source = SyntheticSource(MADE)
    few, many = (np.concatenate([block for block, _ in source.blocks(0, count, ("gallery",))]) for count in (10, 5000))
    assert len(many) == 5000
    assert np.array_equal(few, many[:10])
    assert len(np.unique(many[:, 0])) == 5000
    other = next(source.blocks(1, 10, ("gallery",)))[0]
    assert np.abs((other * few).sum(axis=1)).max() < 0.9


def test_distractors_and_embeddings_are_of_other_products(tmp_path: Path) -> None:
    made = replace(MADE, training=30, validation=20, test=10)
    data = load_embeddings(write_synthetic_embeddings(tmp_path, made))
    others = np.load(write_synthetic_distractors(tmp_path / "others.npy", made, 101))
    assert others.shape == (101, 96)
    assert others.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(others, axis=1), 1, atol=1e-5)
    own = data.vectors[:120].reshape(30, 4, 96)
    assert np.einsum("pid,pjd->pij", own, own)[:, 0, 1].mean() > 0.8
    assert np.abs((others[:100:4, None] * data.vectors[None, ::6]).sum(axis=2)).max() < 0.99
    assert np.median((others @ data.vectors.T).max(axis=1)) < 0.85  # no other image of a product among them


def test_worse_model_sees_the_same_images(tmp_path: Path) -> None:
    good, worse = (
        np.concatenate([block for block, _ in SyntheticSource(MADE, share).blocks(0, 50, ("gallery",))])
        for share in (0.0, 0.2)
    )
    assert (good * worse).sum(axis=1).mean() == pytest.approx(np.sqrt(0.8), abs=0.03)


def test_shares_above_one_are_rejected() -> None:
    with pytest.raises(UserError, match="common: expected shares of at most 1"):
        SyntheticProducts(common=0.5, category=0.3, query_noise=0.3)
    with pytest.raises(UserError, match="head: expected 1 or more"):
        SyntheticProducts(head=0)
