from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.config import RecallConfig
from benchmarks.recall.extra_metrics import score_asymmetric, score_categories, score_reranked
from benchmarks.recall.measure import ScoredModel, _add_asymmetric, add_scores, measure_recall
from benchmarks.recall.queries import ScoredPart, choose_queries
from benchmarks.report.schema import Row
from export.backends.registry import models_of
from student.model import Student, load_student
from tests.conftest import small_student
from vpr.artifacts.card import Embedding
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog, load_catalog
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.embeddings import embed, l2_normalize, torch_forward


@pytest.fixture
def vectors(shop_catalog: Catalog) -> np.ndarray:
    part = shop_catalog.select(split="test")
    rng = np.random.default_rng(0)
    products = np.unique(part.products, return_inverse=True)[1]
    centres = rng.normal(size=(products.max() + 1, 16))
    return l2_normalize((centres[products] + 1.5 * rng.normal(size=(len(part), 16))).astype(np.float32))


def _first_right(part: Catalog, query_rows: np.ndarray, gallery_rows: np.ndarray) -> np.ndarray:
    """Return whether the first result of each query is right, by a faiss index."""
    query, gallery = part.roles == "query", part.roles == "gallery"
    index = faiss.IndexFlatIP(gallery_rows.shape[1])
    index.add(gallery_rows[gallery])
    first = index.search(query_rows[query], 1)[1][:, 0]
    return part.products[gallery][first] == part.products[query]


def test_categories_are_scored_on_their_queries(shop_catalog: Catalog, vectors: np.ndarray) -> None:
    part = shop_catalog.select(split="test")
    hits = _first_right(part, vectors, vectors)
    categories = score_categories(part, hits, 0)
    assert categories is not None
    queries = part.roles == "query"
    assert {name: category.queries for name, category in categories.items()} == {
        name: int((part.categories[queries] == name).sum()) for name in np.unique(part.categories)
    }
    counts = [category.queries for category in categories.values()]
    assert counts == sorted(counts, reverse=True)
    for name, category in categories.items():
        assert category.recall_at_1 == pytest.approx(hits[part.categories[queries] == name].mean())
        products = len(set(part.products[queries][part.categories[queries] == name]))
        assert category.products == products >= 10
        assert category.ci95 is not None
        assert category.ci95[0] <= category.recall_at_1 <= category.ci95[1]


def test_category_of_few_products_has_no_interval(shop_catalog: Catalog, vectors: np.ndarray) -> None:
    part = shop_catalog.select(split="test")
    rows = np.flatnonzero(np.isin(part.products, np.unique(part.products)[:9]))
    few = Catalog(part.table.take(pa.array(rows)), part.root, part.artifact)
    categories = score_categories(few, _first_right(few, vectors[rows], vectors[rows]), 0)
    assert categories is not None
    assert {category.ci95 for category in categories.values()} == {None}


def test_hits_have_an_order_independent_of_the_rows(shop_catalog: Catalog, vectors: np.ndarray) -> None:
    part = shop_catalog.select(split="test")
    order = np.random.default_rng(4).permutation(len(part))
    other = Catalog(part.table.take(pa.array(order)), part.root, part.artifact)
    assert other.sha256 == part.sha256
    row, other_row = (Row.empty("student", "student", "torch", "fp32") for _ in range(2))
    add_scores(row, ScoredPart(part), vectors, 0)
    add_scores(other_row, ScoredPart(other), vectors[order], 0)
    assert other_row.hits == row.hits
    assert set("".join(row.hits.values())) == {"0", "1"}
    assert list(row.hits) == sorted(set(part.products.tolist()))


def test_teacher_gallery_needs_equal_dimensions(shop_catalog: Catalog, vectors: np.ndarray) -> None:
    part = shop_catalog.select(split="test")
    teacher = l2_normalize(vectors + 0.3 * np.random.default_rng(3).normal(size=vectors.shape).astype(np.float32))
    scores = score_asymmetric(part, vectors, teacher, 0)
    assert scores is not None
    assert scores.recall_at_1 == pytest.approx(_first_right(part, vectors, teacher).mean())
    assert score_asymmetric(part, vectors, l2_normalize(np.ascontiguousarray(teacher[:, :8])), 0) is None


def test_steps_that_keep_the_ranking_keep_the_scores(shop_catalog: Catalog, vectors: np.ndarray) -> None:
    part = shop_catalog.select(split="test")
    assert score_reranked(part, vectors, RerankConfig(), 0) is None
    # k-reciprocal with all weight on the original distance ranks as the embeddings do.
    same = score_reranked(part, vectors, RerankConfig(k_reciprocal=True, original_weight=1.0), 0)
    assert same is not None
    assert same.recall_at_1 == pytest.approx(_first_right(part, vectors, vectors).mean())
    other = score_reranked(part, vectors, RerankConfig(qe=3), 0)
    assert other is not None
    assert other.map != same.map


def _write_student(folder: Path, assistant: str = "", dim: int = 32, nested: tuple[int, ...] = ()) -> str:
    """Write a student artifact; ``assistant`` is the path of its assistant, ``nested`` are its nested dimensions."""
    torch.manual_seed(dim)
    config = small_student("patch")
    config = type(config)(**{**asdict(config), "embedding_dim": dim})
    parents = [load_artifact(assistant).as_parent("assistant")] if assistant else []
    with write_artifact(folder, "student", {"model": asdict(config)}, parents) as draft:
        save_file(Student(config).state_dict(), draft.path / "model.safetensors")
        draft.preprocess = Preprocess(size=config.image_size)
        draft.embedding = Embedding(dim=dim, normalised=True, dtype="float32", nested=list(nested))
    return str(folder)


def test_reference_is_the_student_not_its_assistant(shop: Path, tmp_path: Path) -> None:
    assistant = _write_student(tmp_path / "larger", dim=48)
    student = _write_student(tmp_path / "small", assistant)
    config = RecallConfig(str(shop), (assistant, student), str(tmp_path / "recall"), rerank=RerankConfig())
    rows = json.loads((measure_recall(config) / "recall.json").read_text(encoding="utf-8"))
    assert [row["stage"] for row in rows] == ["baseline", "baseline", "student", "student"]
    assert [row["reference"] for row in rows] == [False, False, False, True]
    assert rows[2]["cosine_mean"] is None
    assert rows[2]["first_changed"]["queries"] > 0
    assert (rows[3]["recall_drop"], rows[3]["first_changed"]["queries"]) == (0, 0)
    assert (tmp_path / "recall" / "changed.csv").read_text(encoding="utf-8").count("larger,torch") > 0
    written = (tmp_path / "recall" / "card.json").stat().st_mtime_ns
    measure_recall(config)
    assert (tmp_path / "recall" / "card.json").stat().st_mtime_ns == written


def test_unusable_recall_input_is_rejected(shop: Path, student_artifact: Path, tmp_path: Path) -> None:
    models = (str(student_artifact),)
    with pytest.raises(UserError, match="has no gallery images"):
        measure_recall(RecallConfig(str(shop), models, str(tmp_path / "r"), split="train"))
    with pytest.raises(UserError, match="models: .*student is given twice"):
        measure_recall(RecallConfig(str(shop), models * 2, str(tmp_path / "r")))
    with pytest.raises(UserError, match="models: expected one or more artifacts, got none"):
        measure_recall(RecallConfig(str(shop), (), str(tmp_path / "r")))


def test_cut_dimensions_are_scored(shop: Path, student_artifact: Path, tmp_path: Path) -> None:
    config = RecallConfig(str(shop), (str(student_artifact),), str(tmp_path / "r"), rerank=RerankConfig(), dimensions=4)
    row = json.loads((measure_recall(config) / "recall.json").read_text(encoding="utf-8"))[-1]
    model, artifact = load_student(student_artifact)
    assert artifact.card.preprocess is not None
    part = load_catalog(shop).select(split="test")
    prefix = embed(part, artifact.card.preprocess, torch_forward(model))[:, :4]
    prefix = prefix / np.linalg.norm(prefix, axis=1, keepdims=True)
    assert row["recall_at_1"] == pytest.approx(_first_right(part, prefix, prefix).mean())
    assert "the first 4 dimensions of its embedding" in row["notes"]
    with pytest.raises(UserError, match=r"dimensions: expected at most the 32 of .*, got 33"):
        measure_recall(replace(config, dimensions=33, output=str(tmp_path / "o")))


def test_nested_students_do_not_search_the_teachers_gallery(shop: Path, tmp_path: Path) -> None:
    paths = [_write_student(tmp_path / name, nested=nested) for name, nested in (("plain", ()), ("nested", (8,)))]
    part = choose_queries(load_catalog(shop).select(split="test"))
    plain, nested = (load_artifact(path) for path in paths)
    teacher = np.eye(len(part.catalog), 32, dtype=np.float32) + 0.1
    for artifact, has_scores in ((plain, True), (nested, False)):
        scored = ScoredModel(Row.empty("m", "student", "torch", None), l2_normalize(teacher), models_of(artifact)[0])
        _add_asymmetric(scored, part, l2_normalize(teacher), 0)
        assert (scored.row.asymmetric is not None) == has_scores
        assert ("nested dimensions" in (scored.row.notes or "")) != has_scores
