from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from tests.vpr.gallery.shop import unit_vectors
from vpr.common.errors import UserError
from vpr.retrieval.adapter import Adapter, fit_linear, fit_procrustes


def rotation(dim: int, seed: int = 0) -> NDArray[np.float32]:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0].astype(np.float32)


def test_procrustes_finds_a_rotation() -> None:
    old = unit_vectors(50, 6)
    turned = rotation(6)
    np.testing.assert_allclose(fit_procrustes(old, old @ turned).weight, turned, atol=1e-5)
    np.testing.assert_allclose(fit_procrustes(old, old @ turned).apply(old), old @ turned, atol=1e-5)


@pytest.mark.parametrize(("old_dim", "new_dim"), [(8, 5), (5, 8), (6, 6)])
def test_procrustes_of_other_widths(old_dim: int, new_dim: int) -> None:
    old, new = unit_vectors(40, old_dim), unit_vectors(40, new_dim, seed=1)
    weight = fit_procrustes(old, new).weight
    assert weight.shape == (old_dim, new_dim)
    small = weight.T @ weight if old_dim >= new_dim else weight @ weight.T
    np.testing.assert_allclose(small, np.eye(min(old_dim, new_dim)), atol=1e-5)
    left, _, right = np.linalg.svd(old.T.astype(np.float64) @ new, full_matrices=False)
    np.testing.assert_allclose(weight, left @ right, atol=1e-5)


@pytest.mark.parametrize("count", [4, 40])
def test_linear_equals_least_squares(count: int) -> None:
    """The penalty is written as additional rows of a least-squares problem with an intercept."""
    old, new = unit_vectors(count, 6), unit_vectors(count, 3, seed=1)
    adapter = fit_linear(old, new, ridge=0.1)
    centred = old.astype(np.float64) - old.mean(axis=0, dtype=np.float64)
    penalty = np.sqrt(0.1 * (centred**2).sum() / 6)
    rows = np.block([[old.astype(np.float64), np.ones((count, 1))], [penalty * np.eye(6), np.zeros((6, 1))]])
    expected = np.linalg.lstsq(rows, np.concatenate([new, np.zeros((6, 3))]), rcond=None)[0]
    np.testing.assert_allclose(adapter.weight, expected[:-1], atol=1e-5)
    np.testing.assert_allclose(adapter.bias, expected[-1], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(adapter.apply(old), axis=1), 1, atol=1e-6)


def test_equal_vectors_have_a_linear_map() -> None:
    old, new = np.repeat(unit_vectors(1, 4), 5, axis=0), np.repeat(unit_vectors(1, 3, seed=1), 5, axis=0)
    np.testing.assert_allclose(fit_linear(old, new, 0.1).apply(old), new, atol=1e-5)


def test_weights_in_columns_are_stored_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of SciPy may solve into columns, and safetensors 0.8 stores them as rows (safetensors#825)."""
    old, new = unit_vectors(40, 6), unit_vectors(40, 3, seed=1)
    expected = fit_linear(old, new, 0.1)

    def solve_into_columns(matrix: NDArray[np.float64], target: NDArray[np.float64], **_: str) -> NDArray[np.float64]:
        return np.asfortranarray(np.linalg.solve(matrix, target))

    monkeypatch.setattr("vpr.retrieval.adapter.solve", solve_into_columns)
    stored = load(save({"weight": fit_linear(old, new, 0.1).weight}))["weight"]
    np.testing.assert_allclose(stored, expected.weight, atol=1e-6)


def test_short_results_have_large_errors() -> None:
    """Of two groups with random targets around a centre, the one with more noise has the shorter results."""
    rng = np.random.default_rng(0)
    old = np.repeat(np.eye(4, dtype=np.float32)[:2], 500, axis=0)
    noise = np.repeat([0.1, 1.0], 500)[:, None] * rng.standard_normal((1000, 8))
    new = np.repeat(unit_vectors(2, 8), 500, axis=0) + noise
    new = (new / np.linalg.norm(new, axis=1, keepdims=True)).astype(np.float32)
    adapter = fit_linear(old, new, 1e-6)
    lengths, errors = adapter.lengths(old), ((adapter.apply(old) - new) ** 2).sum(axis=1)
    assert lengths[0] > lengths[-1]
    for group in (slice(0, 500), slice(500, 1000)):
        assert errors[group].mean() == pytest.approx(2 - 2 * lengths[group].mean(), abs=0.01)


def test_vector_without_a_direction_is_an_error() -> None:
    adapter = Adapter(np.zeros((3, 2), np.float32), np.zeros(2, np.float32))
    with pytest.raises(UserError, match="zero or non-finite vector"):
        adapter.apply(unit_vectors(2, 3))
