from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.config import RecallConfig
from benchmarks.recall.extra_metrics import asymmetric, by_category, reranked
from benchmarks.recall.measure import measure_recall, score_row
from student.model import Student
from tests.conftest import small_student
from vpr.artifacts.store import Embedding, load_artifact, write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.embeddings import l2_normalize


@pytest.fixture
def vectors(shop_catalog: Catalog) -> np.ndarray:
    part = shop_catalog.select(split="test")
    rng = np.random.default_rng(0)
    products = np.unique(part.products, return_inverse=True)[1]
    centres = rng.normal(size=(products.max() + 1, 16))
    return l2_normalize((centres[products] + 1.5 * rng.normal(size=(len(part), 16))).astype(np.float32))


def _first_right(part: Catalog, asked: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Whether the first result of each query is right, by a faiss index."""
    query, gallery = part.roles == "query", part.roles == "gallery"
    index = faiss.IndexFlatIP(shown.shape[1])
    index.add(shown[gallery])
    found = index.search(asked[query], 1)[1][:, 0]
    return part.products[gallery][found] == part.products[query]


def test_categories_are_scored_by_their_own_queries(shop_catalog: Catalog, vectors: np.ndarray) -> None:
    part = shop_catalog.select(split="test")
    hits = _first_right(part, vectors, vectors)
    found = by_category(part, hits, 0)
    assert found is not None
    queries = part.roles == "query"
    assert {name: one["queries"] for name, one in found.items()} == {
        name: int((part.categories[queries] == name).sum()) for name in np.unique(part.categories)
    }
    counts = [one["queries"] for one in found.values()]
    assert counts == sorted(counts, reverse=True)
    for name, one in found.items():
        assert one["recall_at_1"] == pytest.approx(hits[part.categories[queries] == name].mean())
        assert one["ci95"][0] <= one["recall_at_1"] <= one["ci95"][1]


def test_hits_are_told_in_one_order_whatever_that_of_the_rows(shop_catalog: Catalog, vectors: np.ndarray) -> None:
    part = shop_catalog.select(split="test")
    order = np.random.default_rng(4).permutation(len(part))
    other = Catalog(part.table.take(pa.array(order)), part.root, part.artifact)
    assert other.sha256 == part.sha256
    hits = score_row(part, vectors, 0)["hits"]
    assert score_row(other, vectors[order], 0)["hits"] == hits
    assert set(hits) == {"0", "1"}


def test_the_teacher_s_gallery_is_searched_where_the_dimensions_agree(
    shop_catalog: Catalog, vectors: np.ndarray
) -> None:
    part = shop_catalog.select(split="test")
    teacher = l2_normalize(vectors + 0.3 * np.random.default_rng(3).normal(size=vectors.shape).astype(np.float32))
    found = asymmetric(part, vectors, teacher, 0)
    assert found is not None
    assert found["recall_at_1"] == pytest.approx(_first_right(part, vectors, teacher).mean())
    assert asymmetric(part, vectors, l2_normalize(np.ascontiguousarray(teacher[:, :8])), 0) is None


def test_steps_that_change_no_ranking_change_no_score(shop_catalog: Catalog, vectors: np.ndarray) -> None:
    part = shop_catalog.select(split="test")
    assert reranked(part, vectors, RerankConfig(), 0) is None
    # k-reciprocal with the whole weight on the original distance ranks as the embeddings do, for each query.
    same = reranked(part, vectors, RerankConfig(k_reciprocal=True, original_weight=1.0), 0)
    assert same is not None
    assert same["recall_at_1"] == pytest.approx(_first_right(part, vectors, vectors).mean())
    other = reranked(part, vectors, RerankConfig(qe=3), 0)
    assert other is not None
    assert other["map"] != same["map"]


def _assistant(folder: Path, of: str = "", dim: int = 32) -> str:
    """A student artifact; ``of`` names its assistant."""
    torch.manual_seed(dim)
    config = small_student("patch")
    config = type(config)(**{**asdict(config), "embedding_dim": dim})
    parents = [load_artifact(of).as_parent("assistant")] if of else []
    with write_artifact(folder, "student", {"model": asdict(config)}, parents) as draft:
        save_file(Student(config).state_dict(), draft.path / "model.safetensors")
        draft.preprocess = Preprocess(size=config.image_size)
        draft.embedding = Embedding(dim=dim, normalised=True, dtype="float32")
    return str(folder)


def test_differences_are_taken_to_the_student_not_to_its_assistant(shop: Path, tmp_path: Path) -> None:
    assistant = _assistant(tmp_path / "larger", dim=48)
    student = _assistant(tmp_path / "small", of=assistant)
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


def test_what_cannot_be_scored_is_refused(shop: Path, student_artifact: Path, tmp_path: Path) -> None:
    models = (str(student_artifact),)
    with pytest.raises(UserError, match="has no gallery images"):
        measure_recall(RecallConfig(str(shop), models, str(tmp_path / "r"), split="train"))
    with pytest.raises(UserError, match="2 artifacts are named 'student'"):
        measure_recall(RecallConfig(str(shop), models * 2, str(tmp_path / "r")))
    with pytest.raises(UserError, match="none given"):
        measure_recall(RecallConfig(str(shop), (), str(tmp_path / "r")))
