from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from export.parity import parity, rank_changes


def test_parity_equals_pytorch_for_any_lengths() -> None:
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(50, 16)).astype(np.float32)
    actual = (expected + 0.3 * rng.normal(size=(50, 16))).astype(np.float32) * rng.uniform(0.1, 9, (50, 1))
    cosine = F.cosine_similarity(torch.from_numpy(expected).double(), torch.from_numpy(actual).double())
    result = parity(expected, actual.astype(np.float32))
    assert result["cosine_mean"] == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert result["cosine_min"] == pytest.approx(cosine.min().item(), abs=1e-6)
    assert result["max_abs"] == pytest.approx(np.abs(expected - actual).max(), rel=1e-5)


def test_non_finite_vector_counts_as_opposite() -> None:
    a = np.eye(3, dtype=np.float32)
    b = a.copy()
    b[1] = np.nan
    metrics = parity(a, b)
    assert (metrics["cosine_min"], metrics["max_abs"]) == (-1.0, float("inf"))
    assert metrics["cosine_mean"] == pytest.approx(1 / 3)


def test_zero_vector_counts_as_opposite() -> None:
    a = np.eye(2, dtype=np.float32)
    assert parity(a, np.zeros_like(a))["cosine_min"] == -1.0


def test_rank_changes_equal_counted_ranks() -> None:
    rng = np.random.default_rng(1)
    expected = rng.normal(size=(40, 25)).astype(np.float32)
    actual = (expected + 0.5 * rng.normal(size=(40, 25))).astype(np.float32)
    before, after = (1 + (scores[:, None] > scores[:, :, None]).sum(axis=2) for scores in (expected, actual))
    result = rank_changes(expected, actual)
    moved = [after[q, before[q] == 1].item() - 1 for q in range(40)]
    assert result["first_moved"] == pytest.approx(np.mean(moved))
    assert result["first_changed"] == np.mean(np.array(moved) > 0)
    both = ((before <= 10) & (after <= 10)).sum(axis=1)
    assert result["overlap"] == pytest.approx(both.mean() / 10)
    assert rank_changes(expected, 2 * expected + 1) == {"first_changed": 0.0, "overlap": 1.0, "first_moved": 0.0}
