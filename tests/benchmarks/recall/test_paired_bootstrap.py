from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.recall.paired_bootstrap import compare_with_reference, recall_drop, write_changed
from export.parity import rank_changes
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import l2_normalize


@pytest.fixture
def part(catalog: Catalog) -> Catalog:
    return catalog.select(split="test")


def test_the_paired_interval_is_narrower_than_two_apart_and_near_the_normal_one() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(1000) < 0.5
    after = before ^ (rng.random(1000) < 0.02)
    found = recall_drop(*("".join("01"[bit] for bit in bits) for bits in (before.tolist(), after.tolist())), seed=0)
    lost = before.astype(float) - after
    half = 1.96 * lost.std() / np.sqrt(1000)
    assert found["recall_drop"] == pytest.approx(before.mean() - after.mean())
    np.testing.assert_allclose(found["recall_drop_ci95"], [lost.mean() - half, lost.mean() + half], atol=0.1 * half)
    assert half < 0.25 * 1.96 * np.sqrt(0.5 / 1000)  # what two intervals apart would give


def test_changes_are_those_of_whole_rankings(part: Catalog, tmp_path: Path) -> None:
    """Against argsorts of all similarities, by code of another module."""
    rng = np.random.default_rng(1)
    reference = l2_normalize(rng.normal(size=(len(part), 16)).astype(np.float32))
    vectors = l2_normalize(reference + 0.5 * rng.normal(size=reference.shape).astype(np.float32) / 4)
    found, changed = compare_with_reference(part, reference, vectors)
    query, gallery = part.roles == "query", part.roles == "gallery"
    scores = [one[query] @ one[gallery].T for one in (reference, vectors)]
    expected = rank_changes(*scores)
    assert found["top10_overlap"] == pytest.approx(expected["overlap"])
    assert found["first_changed"]["queries"] == len(changed)
    assert 0 < len(changed) == pytest.approx(expected["first_changed"] * query.sum())
    np.testing.assert_allclose(found["cosine_mean"], (reference * vectors).sum(axis=1).mean(), atol=1e-6)
    images = np.array(part.table["image"].to_pylist())
    for line in changed:
        place = int(np.flatnonzero(images[query] == line["query"])[0])
        for when, one in zip(("before", "after"), scores, strict=True):
            best = int(one[place].argmax())
            assert line[f"first_{when}"] == images[gallery][best]
            assert line[f"right_{when}"] == (part.products[gallery][best] == line["product"])
    write_changed(tmp_path / "changed.csv", [{"model": "m", "backend": "b", **line} for line in changed])
    with (tmp_path / "changed.csv").open(encoding="utf-8", newline="") as stream:
        assert [line["query"] for line in csv.DictReader(stream)] == [line["query"] for line in changed]


def test_other_dimensions_have_rankings_but_no_cosine(part: Catalog) -> None:
    rng = np.random.default_rng(2)
    wide = l2_normalize(rng.normal(size=(len(part), 16)).astype(np.float32))
    found, _ = compare_with_reference(part, wide, l2_normalize(np.ascontiguousarray(wide[:, :8])))
    assert (found["cosine_mean"], found["cosine_min"]) == (None, None)
    assert 0 < found["top10_overlap"] <= 1
