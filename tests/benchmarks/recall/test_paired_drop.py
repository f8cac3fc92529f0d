from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.recall.paired_drop import RecallDrop, compare_with_reference, compute_recall_drop, write_changed
from export.parity import rank_changes
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import l2_normalize


@pytest.fixture
def part(catalog: Catalog) -> Catalog:
    return catalog.select(split="test")


def test_paired_interval_is_narrow_and_nearly_normal() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(1000) < 0.5
    after = before ^ (rng.random(1000) < 0.02)
    hits = ({str(row): "01"[bit] for row, bit in enumerate(bits)} for bits in (before.tolist(), after.tolist()))
    drop = compute_recall_drop(*hits, seed=0)
    assert drop.ci95 is not None
    assert drop.upper_bound is not None
    lost = before.astype(float) - after
    half = 1.96 * lost.std() / np.sqrt(1000)
    assert drop.mean == pytest.approx(before.mean() - after.mean())
    np.testing.assert_allclose(drop.ci95, [lost.mean() - half, lost.mean() + half], atol=0.1 * half)
    assert drop.upper_bound == pytest.approx(lost.mean() + 1.645 * half / 1.96, abs=0.1 * half)
    assert half < 0.25 * 1.96 * np.sqrt(0.5 / 1000)  # the width of two independent intervals


def test_few_products_have_no_bound() -> None:
    hits = {str(product): "01" for product in range(9)}
    assert compute_recall_drop(hits, hits, 0) == RecallDrop(0.0, None, None, None)


def test_hits_of_other_products_are_an_error() -> None:
    hits = {str(product): "01" for product in range(12)}
    for other in ({**hits, "0": "011"}, {**hits, "new": "0"}, dict(list(hits.items())[1:])):
        with pytest.raises(UserError, match="hits are of other products or queries"):
            compute_recall_drop(hits, other, 0)
    assert compute_recall_drop(hits, dict(reversed(hits.items())), 0).mean == 0


def test_changes_match_full_rankings(part: Catalog, tmp_path: Path) -> None:
    """The expected changes come from argsorts of all similarities in another module."""
    rng = np.random.default_rng(1)
    reference = l2_normalize(rng.normal(size=(len(part), 16)).astype(np.float32))
    vectors = l2_normalize(reference + 0.5 * rng.normal(size=reference.shape).astype(np.float32) / 4)
    difference = compare_with_reference(part, reference, vectors, "m", "b")
    changed = difference.changed
    query, gallery = part.roles == "query", part.roles == "gallery"
    scores = [rows[query] @ rows[gallery].T for rows in (reference, vectors)]
    expected = rank_changes(*scores)
    assert difference.top10_overlap == pytest.approx(expected["overlap"])
    assert difference.first_changed.queries == len(changed)
    assert 0 < len(changed) == pytest.approx(expected["first_changed"] * query.sum())
    np.testing.assert_allclose(difference.cosine_mean, (reference * vectors).sum(axis=1).mean(), atol=1e-6)
    images = np.array(part.table["image"].to_pylist())
    for line in changed:
        index = int(np.flatnonzero(images[query] == line.query)[0])
        for when, similarities in zip(("before", "after"), scores, strict=True):
            best = int(similarities[index].argmax())
            assert getattr(line, f"first_{when}") == images[gallery][best]
            assert getattr(line, f"right_{when}") == (part.products[gallery][best] == line.product)
    write_changed(tmp_path / "changed.csv", changed)
    with (tmp_path / "changed.csv").open(encoding="utf-8", newline="") as stream:
        assert [line["query"] for line in csv.DictReader(stream)] == [line.query for line in changed]


def test_different_dimensions_have_no_cosine(part: Catalog) -> None:
    rng = np.random.default_rng(2)
    reference = l2_normalize(rng.normal(size=(len(part), 16)).astype(np.float32))
    shorter = l2_normalize(np.ascontiguousarray(reference[:, :8]))
    difference = compare_with_reference(part, reference, shorter, "m", "b")
    assert (difference.cosine_mean, difference.cosine_min) == (None, None)
    assert 0 < difference.top10_overlap <= 1
