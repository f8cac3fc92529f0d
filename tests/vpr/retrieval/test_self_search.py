"""Splits whose queries are their gallery: no image finds itself, in training, selection or export."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest

from benchmarks.recall.queries import choose_queries
from export.mixed_precision import Queries, searching_products
from teacher.config import StageConfig, TowerConfig, TrainConfig
from teacher.train import train
from tests.catalogs import write_catalog
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.config import LoaderConfig
from vpr.inference.onnx_session import INPUT, OUTPUT
from vpr.retrieval.embeddings import l2_normalize, score_split
from vpr.retrieval.self_search import find_own_images, find_search_rows, find_self_search
from vpr.training.config import RunConfig
from vpr.training.loop import training_and_validation, validation_values


def _with_role(table: pa.Table, role: str) -> pa.Table:
    column = SCHEMA.get_field_index("role")
    return table.set_column(column, SCHEMA.field("role"), pa.array([role] * len(table), pa.string()))


def _doubled(part: Catalog) -> Catalog:
    """Return a split in which every image is a query and a gallery image, in mixed order."""
    table = pa.concat_tables([_with_role(part.table, "gallery"), _with_role(part.table, "query")]).combine_chunks()
    return Catalog(table.take(pa.array(np.random.default_rng(1).permutation(len(table)))), part.root, part.artifact)


def _vectors(part: Catalog, seed: int = 0) -> np.ndarray:
    """Return the same random vector for each row of an image."""
    images, inverse = np.unique(part.table["image"].to_pylist(), return_inverse=True)
    return l2_normalize(np.random.default_rng(seed).normal(size=(len(images), 5)).astype(np.float32))[inverse]


def _hits(part: Catalog, vectors: np.ndarray) -> dict[str, bool]:
    """Return whether the nearest other image has the product, by image, from a loop."""
    images, first = np.unique(part.table["image"].to_pylist(), return_index=True)
    hits = {}
    for row in first.tolist():
        others = [other for other in first.tolist() if other != row]
        if any(part.products[other] == part.products[row] for other in others):
            nearest = max(others, key=lambda other: float(vectors[row] @ vectors[other]))
            hits[str(part.table["image"][row])] = bool(part.products[nearest] == part.products[row])
    return hits


def test_score_equals_a_loop_over_other_images(catalog: Catalog) -> None:
    single = catalog.select(split="train").take(np.array([0]))
    joined = pa.concat_tables([catalog.select(split="test").table, single.table]).combine_chunks()
    part = _doubled(Catalog(joined, catalog.root))
    vectors = _vectors(part)
    expected = _hits(part, vectors)
    scores = score_split(part, vectors)
    assert scores.queries == len(expected) == len(part) // 2 - 1  # one image is the only one of its product
    assert scores.recall_at_1 == pytest.approx(np.mean(list(expected.values())))
    assert scores.recall_at_1 < 1
    search = find_self_search(part)
    assert search is not None
    assert search.skipped == 1
    images = part.table["image"].to_pylist()
    assert [expected[images[row]] for row in search.queries] == scores.hits.tolist()


def test_training_and_recall_score_the_same(catalog: Catalog) -> None:
    part = _doubled(catalog.select(split="test"))
    vectors = _vectors(part)
    chosen = choose_queries(part)
    assert chosen.own is not None
    by_image = dict(zip(part.table["image"].to_pylist(), vectors, strict=True))
    rows = np.stack([by_image[image] for image in chosen.catalog.table["image"].to_pylist()])
    is_query = chosen.catalog.roles == "query"
    nearest = rows[is_query] @ rows[~is_query].T
    nearest[np.arange(len(nearest)), chosen.own] = -2
    products = chosen.catalog.products
    right = products[~is_query][nearest.argmax(axis=1)] == products[is_query]
    assert score_split(part, vectors).recall_at_1 == pytest.approx(right.mean())


def test_other_splits_do_not_search_themselves(catalog: Catalog) -> None:
    assert find_self_search(catalog.select(split="test")) is None
    assert find_self_search(catalog.select(split="train")) is None
    assert validation_values(catalog) == {}


def test_splits_search_themselves_or_others(catalog: Catalog) -> None:
    """Only the validation split is doubled; each gallery image of it counts once."""
    validation = _doubled(catalog.select(split="validation"))
    tables = [catalog.select(split="test").table, validation.table, catalog.select(split="train").table]
    rows = Catalog(pa.concat_tables(tables).combine_chunks(), catalog.root)
    found = find_search_rows(rows, {"test", "validation"}, {"test", "validation"})
    images, splits = (np.array(rows.table[name].to_pylist()) for name in ("image", "split"))
    assert found.own is not None
    is_test = splits[found.queries] == "test"
    assert np.array_equal(found.queries[is_test], np.flatnonzero((splits == "test") & (rows.roles == "query")))
    assert (found.own[is_test] == -1).all()
    own = found.own[~is_test]
    assert np.array_equal(images[found.gallery[own]], images[found.queries[~is_test]])
    assert len(np.unique(images[found.gallery])) == len(found.gallery)
    assert (np.diff(found.gallery) > 0).all()
    kept = np.random.default_rng(0).random(len(found.gallery)) < 0.5
    part = found.keep(kept)
    assert part.own is not None
    is_there = (part.own >= 0) & ~is_test
    assert np.array_equal(images[part.gallery[part.own[is_there]]], images[part.queries[is_there]])
    assert not np.isin(images[part.queries[~is_test & ~is_there]], images[part.gallery]).any()
    assert find_search_rows(rows, {"test"}, {"test", "train"}).own is None


def test_own_images_are_those_of_one_content(catalog: Catalog) -> None:
    part = _doubled(catalog.select(split="test"))
    images = np.array(part.table["image"].to_pylist())
    expected = images[part.roles == "query"][:, None] == images[part.roles == "gallery"][None]
    assert np.array_equal(find_own_images(part), expected)
    assert not find_own_images(catalog.select(split="test")).any()


def test_products_of_single_images_cannot_be_searched(catalog: Catalog) -> None:
    part = catalog.select(split="test")
    _, first = np.unique(part.products, return_index=True)
    with pytest.raises(UserError, match="queries and gallery are the same images, and no product has two of them"):
        find_self_search(_doubled(part.take(np.sort(first))))


def test_layers_are_searched_without_the_own_image(catalog: Catalog, tiny_graph: onnx.ModelProto) -> None:
    part = _doubled(catalog.select(split="validation"))
    products = np.unique(searching_products(part))[:2]
    colours = np.random.default_rng(0).uniform(size=(len(np.unique(part.table["image"].to_pylist())), 3))
    _, inverse = np.unique(part.table["image"].to_pylist(), return_inverse=True)
    pixels = np.broadcast_to(colours[inverse][:, :, None, None], (len(part), 3, 4, 4)).astype(np.float32)
    queries = Queries(part, pixels, products)
    scores = queries.score(queries.embed(tiny_graph))
    mean = pixels.mean(axis=(2, 3))
    expected = _hits(part, l2_normalize(mean))
    images = dict(zip(part.table["image"].to_pylist(), part.products.tolist(), strict=True))
    chosen = [hit for image, hit in expected.items() if images[image] in products]
    assert scores.queries == len(chosen) == len(queries.query_products)
    assert scores.recall_at_1 == pytest.approx(np.mean(chosen))


@pytest.fixture
def tiny_graph() -> onnx.ModelProto:
    """Graph whose embedding is the mean colour of the image."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("ReduceMean", [INPUT, "axes"], [OUTPUT], keepdims=0)
    axes = onnx.numpy_helper.from_array(np.array([2, 3]), "axes")
    inputs = [helper.make_tensor_value_info(INPUT, float32, ["batch", 3, 4, 4])]
    outputs = [helper.make_tensor_value_info(OUTPUT, float32, ["batch", 3])]
    graph = helper.make_graph([node], "mean", inputs, outputs, [axes])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_teacher_is_selected_without_the_own_image(
    catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    logging.getLogger("vpr").propagate = True
    validation = _doubled(catalog.select(split="validation"))
    joined = pa.concat_tables([catalog.select(split="train").table, validation.table]).combine_chunks()
    path = write_catalog(tmp_path / "c", Catalog(joined, catalog.root))
    assert len(training_and_validation(Catalog(joined, catalog.root), "c")[1]) == len(validation)
    assert "validation: its queries are its gallery, so each image searches the others" in caplog.text
    config = TrainConfig(
        catalog=str(path),
        output=str(tmp_path / "teacher"),
        tower=TowerConfig("sample", "", 32),
        stages=(StageConfig("all", 1, lr_head=1e-6, lr_tower=1e-6),),
        loader=LoaderConfig(batch_size=16, keep_in_memory=True),
        run=RunConfig(precision="32-true"),
    )
    card = load_artifact(train(config)).card
    assert card.metrics["val_recall_at_1"] < 1
    assert card.config["validation"] == "leave-one-out"
