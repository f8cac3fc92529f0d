from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.config import RecallConfig
from benchmarks.recall.measure import measure_recall
from benchmarks.recall.queries import choose_queries
from tests.catalogs import write_catalog
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.embeddings import l2_normalize
from vpr.retrieval.metrics import evaluate
from vpr.retrieval.search import search_others


def _with_roles(catalog: Catalog, roles: list[str]) -> Catalog:
    column = SCHEMA.get_field_index("role")
    table = catalog.table.set_column(column, SCHEMA.field("role"), pa.array(roles, pa.string()))
    return Catalog(table, catalog.root, catalog.artifact)


@pytest.fixture
def images(catalog: Catalog) -> Catalog:
    """Test split in which every image is in the gallery."""
    part = catalog.select(split="test")
    return _with_roles(part, ["gallery"] * len(part))


def test_each_image_searches_all_others(images: Catalog) -> None:
    """Compare with a loop over queries that sorts the other images."""
    part = choose_queries(images, leave_one_out=True)
    rng = np.random.default_rng(0)
    vectors = l2_normalize(rng.normal(size=(len(images), 6)).astype(np.float32))
    doubled = part.embed(lambda catalog: vectors[: len(catalog)])
    query, gallery = part.catalog.roles == "query", part.catalog.roles == "gallery"
    products = images.products
    scores = evaluate(doubled[query], products, doubled[gallery], products, own=part.own)
    precisions, hits = [], []
    for row in range(len(images)):
        others = [other for other in range(len(images)) if other != row]
        order = sorted(others, key=lambda other: -float(vectors[row] @ vectors[other]))
        right = [products[other] == products[row] for other in order]
        ranks = np.flatnonzero(right)
        precisions.append(np.mean((np.arange(len(ranks)) + 1) / (ranks + 1)))
        hits.append(right[0])
    assert scores.recall_at_1 == pytest.approx(np.mean(hits))
    assert scores.map == pytest.approx(np.mean(precisions))
    nearest = search_others(doubled[query], doubled[gallery], 1, np.arange(len(images)))[1][:, 0]
    assert (products[nearest] == products).tolist() == hits
    assert not (nearest == np.arange(len(images))).any()


def test_equal_queries_and_gallery_leave_one_out_by_themselves(images: Catalog) -> None:
    both = pa.concat_tables([images.table, _with_roles(images, ["query"] * len(images)).table])
    part = choose_queries(Catalog(both.combine_chunks(), images.root))
    assert part.own is not None
    assert part.own.tolist() == list(range(len(images)))
    assert (part.catalog.roles == "query").sum() == (part.catalog.roles == "gallery").sum() == len(images)
    assert part.notes == ["each query searches all other images of the split (leave-one-out)"]


def test_repeated_content_counts_once(images: Catalog) -> None:
    """A byte-identical image under another name would be found first by its copy."""
    twice = Catalog(pa.concat_tables([images.table, images.table.slice(0, 3)]).combine_chunks(), images.root)
    part = choose_queries(twice, leave_one_out=True)
    assert len(part.catalog) == 2 * len(images)


def test_unmatched_queries_are_left_out_on_request(catalog: Catalog, tmp_path: Path, student_artifact: Path) -> None:
    split = catalog.select(split="test")
    lonely = np.unique(split.products)[0]
    part = split.where(~((split.products == lonely) & (split.roles == "gallery")))
    queries = int((part.roles == "query").sum())
    count = int(((part.products == lonely) & (part.roles == "query")).sum())
    path = str(write_catalog(tmp_path / "c", part))
    config = RecallConfig(path, (str(student_artifact),), str(tmp_path / "r"), rerank=RerankConfig())
    problem = rf"split: {count} of {queries} queries have no other gallery image .* first 'product-.*--skip-unmatched"
    with pytest.raises(UserError, match=problem):
        measure_recall(config)
    assert not (tmp_path / "r").exists()
    skipping = RecallConfig(path, config.models, config.output, rerank=RerankConfig(), skip_unmatched=True)
    rows = json.loads((measure_recall(skipping) / "recall.json").read_text())
    assert {(row["queries"], row["skipped_queries"]) for row in rows} == {(queries - count, count)}
    assert f"{count} queries left out" in rows[-1]["notes"]


def test_single_image_of_a_product_is_unmatched(images: Catalog) -> None:
    part = images.take(np.array([0, 1, 8]))
    names = part.products.tolist()
    assert names[0] == names[1] != names[2]
    with pytest.raises(UserError, match="1 of 3 queries have no other gallery image"):
        choose_queries(part, leave_one_out=True)
    left = choose_queries(part, leave_one_out=True, skip_unmatched=True)
    assert (left.skipped, left.own.tolist() if left.own is not None else None) == (1, [0, 1])
    with pytest.raises(UserError, match="2 of 2 queries"):
        choose_queries(part.take(np.array([0, 2])), leave_one_out=True, skip_unmatched=True)


def test_recall_leaves_one_out(images: Catalog, tmp_path: Path, student_artifact: Path) -> None:
    path = str(write_catalog(tmp_path / "c", images))
    with pytest.raises(UserError, match=r"split: this split has no query images\. .*--leave-one-out"):
        measure_recall(RecallConfig(path, (str(student_artifact),), str(tmp_path / "r")))
    config = RecallConfig(path, (str(student_artifact),), str(tmp_path / "r"), leave_one_out=True)
    rows = json.loads((measure_recall(config) / "recall.json").read_text())
    assert {(row["queries"], row["gallery"]) for row in rows} == {(len(images), len(images))}
    assert all("leave-one-out" in row["notes"] for row in rows)
    with pytest.raises(UserError, match="rerank: its steps compare a query with the gallery"):
        RecallConfig(path, ("m",), "r", leave_one_out=True, rerank=RerankConfig(qe=3))
