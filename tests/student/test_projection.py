from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from student.config import DimensionConfig, DistillConfig, LossConfig, StudentConfig
from student.projection import fit_projection, resolve_dimensions, rotates_targets
from vpr.common.errors import UserError
from vpr.retrieval.cut import cut_vectors
from vpr.retrieval.embeddings import l2_normalize
from vpr.retrieval.projection import preserve_cosines, principal_directions, principal_rotation, project


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
    labels_only = replace(
        reduction("none", 24), losses=LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, margin=1.0)
    )
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


def test_rotation_keeps_cosines_and_its_prefixes_are_principal() -> None:
    vectors = decaying_vectors(300, 40)
    rotation = principal_rotation(vectors)
    np.testing.assert_allclose(rotation.T.double() @ rotation.double(), np.eye(40), atol=1e-5)
    rotated = project(torch.from_numpy(vectors), rotation).numpy()
    np.testing.assert_allclose(rotated @ rotated.T, vectors @ vectors.T, atol=1e-5)
    singular = np.linalg.svd(vectors.astype(np.float64))[2]
    for dim in (1, 6, 39):
        expected = l2_normalize((vectors @ singular[:dim].T).astype(np.float32))
        prefix = cut_vectors(rotated, dim)
        np.testing.assert_allclose(prefix @ prefix.T, expected @ expected.T, atol=1e-4)


def test_rotation_of_few_vectors_is_complete() -> None:
    vectors = decaying_vectors(5, 12)
    rotation = principal_rotation(vectors)
    np.testing.assert_allclose(rotation.T.double() @ rotation.double(), np.eye(12), atol=1e-5)
    assert np.abs(vectors @ rotation[:, 5:].numpy()).max() < 1e-5


@pytest.mark.parametrize(("method", "student_dim", "nested"), [("none", 0, (8, 40)), ("pca", 24, (24,))])
def test_prefixes_are_shorter_than_the_embedding(method: Any, student_dim: int, nested: tuple[int, ...]) -> None:
    config = replace(reduction(method, student_dim), losses=LossConfig(nested=nested))
    width = student_dim or 40
    with pytest.raises(UserError, match=rf"losses\.nested: expected less than the student's {width} .*, got {width}"):
        resolve_dimensions(config, 40)


def test_projector_does_not_support_prefixes() -> None:
    with pytest.raises(UserError, match=r"losses\.nested: the projector reads all dimensions"):
        replace(reduction("projector", 24), losses=LossConfig(nested=(8,)))
    relations = LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, affinity=1.0, nested=(8,))
    assert not rotates_targets(replace(reduction("none", 24), losses=relations))
