from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from student.config import DimensionConfig, DistillConfig, LossConfig, StudentConfig
from student.projection import fit_projection, resolve_dimensions
from vpr.common.errors import UserError
from vpr.retrieval.embeddings import l2_normalize
from vpr.retrieval.projection import preserve_cosines, principal_directions, project


def decaying_vectors(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Return unit vectors with a spectrum of 1 / k, rotated away from the axes."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return l2_normalize((rng.standard_normal((n, dim)) / np.arange(1, dim + 1) @ rotation).astype(np.float32))


def cosine_error(vectors: np.ndarray, projection: torch.Tensor) -> float:
    projected = project(torch.from_numpy(vectors), projection).numpy()
    return float(np.square(projected @ projected.T - vectors @ vectors.T).mean())


def test_directions_are_right_singular_vectors() -> None:
    vectors = decaying_vectors(300, 40)
    directions = principal_directions(vectors, 6).numpy()
    expected = np.linalg.svd(vectors.astype(np.float64))[2][:6].T
    # Directions are equal up to their sign.
    np.testing.assert_allclose(np.abs(directions.T @ expected), np.eye(6), atol=1e-4)
    np.testing.assert_allclose(directions.T @ directions, np.eye(6), atol=1e-5)


def test_all_directions_lose_nothing() -> None:
    vectors = decaying_vectors(100, 12)
    assert cosine_error(vectors, principal_directions(vectors, 12)) < 1e-10


@pytest.mark.slow
def test_learned_projection_generalises_better() -> None:
    vectors = decaying_vectors(1200, 48)
    fitted, heldout = vectors[:800], vectors[800:]
    pca = principal_directions(fitted, 8)
    learned = preserve_cosines(fitted, pca, 300, seed=0)
    assert cosine_error(heldout, learned) < cosine_error(heldout, pca)
    torch.testing.assert_close(learned, preserve_cosines(fitted, pca, 300, seed=0))


def test_method_selects_the_projection() -> None:
    vectors = decaying_vectors(200, 20)
    config = DimensionConfig("pca", steps=20)
    torch.testing.assert_close(fit_projection(config, vectors, 5, 0), principal_directions(vectors, 5))
    learned = fit_projection(DimensionConfig("cosine", steps=20), vectors, 5, 0)
    assert not torch.allclose(learned, principal_directions(vectors, 5))


@pytest.mark.parametrize(("images", "dim"), [(100, 21), (10, 12)])
def test_too_many_directions_are_rejected(images: int, dim: int) -> None:
    with pytest.raises(UserError, match=rf"model\.embedding_dim: .*, got {dim}\."):
        fit_projection(DimensionConfig("pca"), decaying_vectors(images, 20), dim, 0)
    with pytest.raises(ValueError, match=f"no {dim} directions"):
        principal_directions(decaying_vectors(images, 20), dim)


@pytest.mark.parametrize(
    ("method", "student_dim", "expected"),
    [("none", 0, (40, 40)), ("pca", 24, (24, 24)), ("cosine", 24, (24, 24)), ("projector", 24, (24, 40))],
)
def test_dimensions_follow_the_method(method: Any, student_dim: int, expected: tuple[int, int]) -> None:
    assert resolve_dimensions(reduction(method, student_dim), 40) == expected


def test_labels_alone_allow_any_dimension() -> None:
    labels_only = replace(reduction("none", 24), losses=LossConfig(cosine=0.0, similarity_kl=0.0, margin=1.0))
    assert resolve_dimensions(labels_only, 40) == (24, 40)


@pytest.mark.parametrize(
    ("method", "student_dim", "reason"), [("none", 24, "differs from"), ("pca", 41, "is more than")]
)
def test_wrong_dimensions_are_rejected(method: Any, student_dim: int, reason: str) -> None:
    with pytest.raises(UserError, match=rf"model\.embedding_dim: {student_dim} {reason} the teacher's 40\."):
        resolve_dimensions(reduction(method, student_dim), 40)


def reduction(method: Any, student_dim: int) -> DistillConfig:
    model = StudentConfig(embedding_dim=student_dim)
    return DistillConfig(("teacher",), "catalog", "student", model=model, dimension=DimensionConfig(method))


def test_projection_is_exact_under_autocast() -> None:
    vectors, projection = torch.randn(6, 16), torch.randn(16, 4)
    expected = project(vectors, projection)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = project(vectors, projection)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
