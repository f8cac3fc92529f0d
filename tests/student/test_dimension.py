from __future__ import annotations

import numpy as np
import pytest
import torch

from student.config import DimensionConfig
from student.dimension import fit_projection, preserve_cosines, principal_directions, project
from vpr.common.errors import UserError
from vpr.retrieval.embeddings import l2_normalize


def decaying(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Unit vectors whose spectrum falls as 1 / k, turned so that no axis is a direction of it."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return l2_normalize((rng.standard_normal((n, dim)) / np.arange(1, dim + 1) @ turn).astype(np.float32))


def cosine_error(vectors: np.ndarray, projection: torch.Tensor) -> float:
    short = project(torch.from_numpy(vectors), projection).numpy()
    return float(np.square(short @ short.T - vectors @ vectors.T).mean())


def test_principal_directions_are_the_right_singular_vectors() -> None:
    vectors = decaying(300, 40)
    ours = principal_directions(vectors, 6).numpy()
    theirs = np.linalg.svd(vectors.astype(np.float64))[2][:6].T
    # The same plane: the basis of one is up to its sign that of the other.
    np.testing.assert_allclose(np.abs(ours.T @ theirs), np.eye(6), atol=1e-4)
    np.testing.assert_allclose(ours.T @ ours, np.eye(6), atol=1e-5)


def test_all_directions_lose_nothing() -> None:
    vectors = decaying(100, 12)
    assert cosine_error(vectors, principal_directions(vectors, 12)) < 1e-10


def test_learned_projection_keeps_cosines_better_also_of_vectors_it_has_not_seen() -> None:
    vectors = decaying(1200, 48)
    seen, unseen = vectors[:800], vectors[800:]
    pca = principal_directions(seen, 8)
    learned = preserve_cosines(seen, pca, 300, seed=0)
    assert cosine_error(unseen, learned) < cosine_error(unseen, pca)
    torch.testing.assert_close(learned, preserve_cosines(seen, pca, 300, seed=0))


def test_the_method_decides() -> None:
    vectors = decaying(200, 20)
    config = DimensionConfig("pca", steps=20)
    torch.testing.assert_close(fit_projection(config, vectors, 5, 0), principal_directions(vectors, 5))
    learned = fit_projection(DimensionConfig("cosine", steps=20), vectors, 5, 0)
    assert not torch.allclose(learned, principal_directions(vectors, 5))


@pytest.mark.parametrize(("images", "dim"), [(100, 21), (10, 12)])
def test_more_directions_than_there_are_are_refused(images: int, dim: int) -> None:
    with pytest.raises(UserError, match=rf"model\.embedding_dim: {dim} directions cannot be fitted"):
        principal_directions(decaying(images, 20), dim)
