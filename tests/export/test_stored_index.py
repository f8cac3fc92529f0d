"""A hand-off with a confirmed storage setting: its index, its bound and its client."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from benchmarks.config import StorageConfig
from benchmarks.report.storage_schema import Storage
from benchmarks.storage.command import measure_storage
from export.config import ServingConfig
from export.serving import export_serving
from tests.export.client import run_client, write_served_model
from tests.vpr.gallery.shop import Vectors, name_images, write_model, write_shop, write_threshold
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.retrieval.config import IndexTuning
from vpr.retrieval.embeddings import load_embeddings
from vpr.retrieval.open_set import Probability, find_best_products
from vpr.retrieval.threshold_command import StoredThreshold
from vpr.retrieval.vector_index import StorageSetting, build_index

DIM, TRAINING, GALLERY, QUERIES = 16, 400, 120, 30
FLAT = StorageSetting(DIM, None, "float32", "flat")
SMALL = StorageSetting(8, "pca", "int8", "flat")
PQ = StorageSetting(8, "pca", "pq", "ivf-shortlist", "float16")
TUNING = IndexTuning(nprobe=1, ef_search=40, shortlist=30)


def draw(count: int, seed: int) -> Vectors:
    """Return unit vectors with a falling spectrum."""
    vectors = np.random.default_rng(seed).normal(size=(count, DIM)) / np.sqrt(np.arange(1, DIM + 1))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_all(folder: Path) -> tuple[str, str]:
    """Write a model, and embeddings of training, gallery and query images, as `vpr bench storage` measures them."""
    model = write_served_model(folder, DIM)
    splits = ["train"] * TRAINING + ["test"] * (GALLERY + QUERIES)
    roles = ["train"] * TRAINING + ["gallery"] * GALLERY + ["query"] * QUERIES
    vectors = np.concatenate([draw(TRAINING, 0), draw(GALLERY, 1), draw(QUERIES, 2)])
    return model, write_shop(folder / "all", name_images(len(vectors)), vectors, roles=roles, splits=splits)


def write_report(path: Path, embeddings: Artifact, settings: dict[int, StorageSetting | None], **changes: Any) -> str:
    """Write a report that confirmed a setting, or none, for each size of gallery."""
    rows = [{"size": size, "name": setting.name, **asdict(setting)} for size, setting in settings.items() if setting]
    decisions = [
        {
            "size": size, "max_recall_drop": 0.02, "confidence": 0.9, "max_ms": None,
            "chosen": setting.name if setting else None, "outcome": "not confirmable", "drop_upper_bound": 0.015,
            "smallest_confirmable_drop": 0.01, "search_products": 50, "confirmation_products": 100,
            "sequence": [], "untested": 0,
        }
        for size, setting in settings.items()
    ]  # fmt: skip
    galleries = [
        {"size": size, "real_images": 90, "real_distractors": 0, "synthetic_distractors": size - 90}
        for size in settings
    ]
    values = {"name": "stored", "model": "student", "reference": "student", "split": "test", "queries": 30}
    values |= {"products": 10, "threads": 1, "galleries": galleries, "rows": rows, "decisions": decisions, **changes}
    parents = [embeddings.as_parent("embeddings"), *embeddings.parents("model")]
    with write_artifact(path, "report", {"tuning": asdict(TUNING)}, parents) as draft:
        (draft.path / "storage.json").write_text(json.dumps(Storage.model_validate(values).to_json()))
    return str(path)


@pytest.mark.slow  # draws the charts of the report
def test_setting_that_the_benchmark_confirmed_is_exported(tmp_path: Path) -> None:
    """The report is the real one; the index has a byte for each dimension that is kept."""
    model = write_served_model(tmp_path, DIM)
    names, roles = ("train", "validation", "test"), (["gallery"] * 3, *[["query", "query", "gallery"]] * 2)
    ids = [
        (f"{split}-{product}", f"{product}/{view}.jpg") for split in names for product in range(80) for view in range(3)
    ]
    vectors = draw(len(ids) // 3, 0).repeat(3, axis=0) + 0.2 * draw(len(ids), 1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    splits = [product.partition("-")[0] for product, _ in ids]
    measured = write_shop(
        tmp_path / "all", ids, vectors, roles=[role for part in roles for role in part * 80], splits=splits
    )
    config = StorageConfig(
        *(measured, str(tmp_path / "stored")), sizes=(400,), dims=(8,), formats=("int8",), indexes=("flat",),
        max_recall_drop=0.2, seconds=0.0, queries=160,
    )  # fmt: skip
    report = measure_storage(config)
    output = export_serving(ServingConfig(model, measured, str(tmp_path / "serving"), storage=str(report)))
    index = faiss.read_index(str(output / "gallery" / "index.faiss"))
    assert "The index stores 8 dimensions (pca) int8 flat." in (output / "README.md").read_text()
    assert (index.d, index.ntotal, index.sa_code_size()) == (DIM, 400, 8)


@pytest.mark.parametrize("reduction", ["pca", "truncate"])
def test_index_searches_in_the_reduced_space(reduction: Any, tmp_path: Path) -> None:
    """Principal directions by an SVD in float64; a client passes vectors of the model's width."""
    model, measured = write_all(tmp_path)
    setting = StorageSetting(6, reduction, "float32", "flat")
    report = write_report(tmp_path / "stored", load_artifact(measured), {200: setting, 500: FLAT, 100: FLAT})
    output = export_serving(ServingConfig(model, measured, str(tmp_path / "serving"), storage=report))
    training, gallery, queries = (
        draw(n, seed).astype(np.float64) for seed, n in enumerate((TRAINING, GALLERY, QUERIES))
    )
    directions = np.linalg.svd(training)[2][:6].T if reduction == "pca" else np.eye(DIM)[:, :6]
    reduced = [part @ directions for part in (queries, gallery)]
    reduced = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in reduced]
    expected = np.argsort(-reduced[0] @ reduced[1].T, axis=1)
    index = faiss.read_index(str(output / "gallery" / "index.faiss"))
    np.testing.assert_array_equal(index.search(queries.astype(np.float32), 10)[1], expected[:, :10])
    assert [[row["id"] for row in answer] for answer in run_client(output, draw(QUERIES, 2))] == expected[
        :, :10
    ].tolist()
    text = (output / "README.md").read_text()
    assert f"The index stores 6 dimensions ({reduction}) float32 flat." in text
    assert "confirmed the setting on 100 products: recall@1 is at most 0.02 lower" in text
    assert "with 90 % confidence" in text
    assert "200 vectors, 110 of them synthetic. This one has 120." in text
    card = load_artifact(output, "serving").card
    assert card.parents[-1].role == "storage"
    exact = np.argsort(-queries @ gallery.T, axis=1)[:, :10]
    overlap = np.mean([np.isin(a, b).mean() for a, b in zip(exact, expected[:, :10], strict=True)])
    assert card.metrics["index_top10_overlap"] == pytest.approx(overlap, abs=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        StorageSetting(DIM, None, "int8", "hnsw"),
        StorageSetting(8, "pca", "float16", "ivf"),
        StorageSetting(8, "pca", "binary", "shortlist", "int8"),
        StorageSetting(DIM, None, "rabitq3", "flat"),
        PQ,
    ],
    ids=lambda setting: setting.name,
)
def test_written_index_is_the_measured_one(setting: StorageSetting, tmp_path: Path) -> None:
    """The search effort and the short list are stored in the file."""
    model, measured = write_all(tmp_path)
    report = write_report(tmp_path / "stored", load_artifact(measured), {200: setting})
    output = export_serving(ServingConfig(model, measured, str(tmp_path / "serving"), storage=report))
    queries = draw(QUERIES, 2)
    expected = build_index(setting, draw(TRAINING, 0), draw(GALLERY, 1), TUNING).search(queries, 10)
    found = faiss.read_index(str(output / "gallery" / "index.faiss")).search(queries, 10)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    if setting.index == "ivf":
        assert (found[1] < 0).any()  # a list has fewer images than results
    answers = [[row["id"] for row in answer] for answer in run_client(output, queries)]
    assert answers == [row[row >= 0].tolist() for row in expected[1]]


def test_client_compares_cosines_with_the_threshold(tmp_path: Path) -> None:
    """Scores of binary codes are no cosines. What the index misses can only turn a match into none."""
    model, measured = write_all(tmp_path)
    stored = load_embeddings(measured)
    rows = stored.rows_with_role("gallery")
    queries = draw(QUERIES, 2)
    best = find_best_products(queries, stored.vectors[rows], stored.products[rows])
    threshold = StoredThreshold("similarity", float(np.median(best.similarity)), Probability(0.0, 0.0, 0.0), 40)
    path = write_threshold(tmp_path / "threshold", load_artifact(tmp_path / "student"), threshold)
    setting = StorageSetting(DIM, None, "binary", "flat")
    report = write_report(tmp_path / "stored", load_artifact(measured), {200: setting})
    config = ServingConfig(model, measured, str(tmp_path / "serving"), storage=report, threshold=path)
    answers = run_client(export_serving(config), queries)
    accepted, found = threshold.accepts(best), [answer != "no match" for answer in answers]
    assert not (np.array(found) & ~accepted).any()
    assert sum(found) > 0.7 * accepted.sum()
    for query, answer in zip(queries, answers, strict=True):
        if answer != "no match":
            cosines = [float(query @ stored.vectors[rows[row["id"]]]) for row in answer]
            assert cosines == sorted(cosines, reverse=True)
            assert cosines[0] >= threshold.value


def test_training_vectors_are_those_that_were_measured(tmp_path: Path) -> None:
    model, measured = write_all(tmp_path)
    report = write_report(tmp_path / "stored", load_artifact(measured), {200: SMALL})
    gallery = write_shop(tmp_path / "gallery", name_images(GALLERY), draw(GALLERY, 1))
    config = ServingConfig(model, gallery, str(tmp_path / "serving"), storage=report)
    with pytest.raises(UserError, match=r"training: .*gallery are not the embeddings 'all' .*\. Set --training"):
        export_serving(config)
    queries = draw(QUERIES, 2)
    output = export_serving(replace(config, training=measured))
    expected = build_index(SMALL, draw(TRAINING, 0), draw(GALLERY, 1), TUNING).search(queries, 10)[1]
    found = faiss.read_index(str(output / "gallery" / "index.faiss")).search(queries, 10)[1]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({100: FLAT}, {}, "confirmed in a gallery of 100 vectors, this one has 120. .* --sizes 120 or more"),
        ({200: None, 100: FLAT}, {}, "200 vectors: not confirmable"),
        ({200: FLAT}, {"decisions": []}, "measured without a budget, so no setting is confirmed"),
        ({200: FLAT}, {"rows": []}, "not a usable report"),
        ({200: StorageSetting(32, None, "int8", "flat")}, {}, "unknown setting '32 dimensions int8 flat'"),
        ({200: StorageSetting(8, None, "int8", "flat")}, {}, "impossible setting"),
        ({200: StorageSetting(DIM, None, "binary", "hnsw")}, {}, "unknown setting"),
        ({200: replace(PQ, rescoring=None)}, {}, "impossible setting"),
    ],
)
def test_setting_that_is_not_confirmed_is_rejected(
    settings: dict[int, StorageSetting | None], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, measured = write_all(tmp_path)
    report = write_report(tmp_path / "stored", load_artifact(measured), settings, **changes)
    with pytest.raises(UserError, match=message):
        export_serving(ServingConfig(model, measured, str(tmp_path / "serving"), storage=report))
    assert not (tmp_path / "serving").exists()


def test_setting_of_another_model_is_rejected(tmp_path: Path) -> None:
    model, measured = write_all(tmp_path)
    write_model(tmp_path, "other", DIM)
    foreign = write_shop(tmp_path / "foreign", name_images(GALLERY), draw(GALLERY, 1), "other")
    report = write_report(tmp_path / "stored", load_artifact(foreign), {200: FLAT})
    with pytest.raises(UserError, match="storage: .* measured with 'other', the gallery is of 'student'"):
        export_serving(ServingConfig(model, measured, str(tmp_path / "serving"), storage=report))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "s", "index": "hnsw"}, "index: --storage sets the index, got hnsw"),
        ({"training": "t"}, "training: only --storage fits an index"),
    ],
)
def test_options_that_exclude_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServingConfig("m", "g", "o", **changes)
