"""Threshold and metadata of a hand-off, used as a client without this toolkit uses them: by its README."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.config import ServingConfig
from export.serving import export_serving
from tests.export.client import run_client, write_served_model
from tests.vpr.gallery.shop import Vectors, name_images, unit_vectors, write_model, write_shop, write_threshold
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError
from vpr.retrieval.config import ScoreName
from vpr.retrieval.embeddings import load_embeddings
from vpr.retrieval.open_set import Probability, find_best_products, score_queries
from vpr.retrieval.threshold_command import StoredThreshold, load_threshold

FITTED = Probability(-3.0, 4.0, 2.0)


def write_uneven_shop(folder: Path) -> tuple[str, Vectors]:
    """Write a gallery in which the first product fills the first results, and return queries near its images."""
    ids = [("big", f"big/{number}.jpg") for number in range(12)] + name_images(30, images=2)
    vectors = unit_vectors(len(ids))
    vectors[:12] = vectors[0] + 0.05 * vectors[:12]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    near = vectors[::2] + 0.5 * unit_vectors(len(vectors[::2]), seed=1)
    queries = np.concatenate([near / np.linalg.norm(near, axis=1, keepdims=True), unit_vectors(9, seed=2)])
    return write_shop(folder / "gallery", ids, vectors), queries.astype(np.float32)


@pytest.mark.parametrize("score", ["similarity", "margin", "probability"])
def test_client_answers_as_the_toolkit(score: ScoreName, tmp_path: Path) -> None:
    model = write_served_model(tmp_path, 8)
    gallery, queries = write_uneven_shop(tmp_path)
    stored = load_embeddings(gallery)
    best = find_best_products(queries, stored.vectors, stored.products)
    value = float(np.median(score_queries(score, best, FITTED))) + 1e-4
    threshold = StoredThreshold(score, value, FITTED, 16, 0.01, 0.95)
    path = write_threshold(tmp_path / "threshold", load_artifact(tmp_path / "student"), threshold)
    table = tmp_path / "metadata.csv"
    table.write_text("product,image,title,price\nbig,,Chair,20\np3,3/1.jpg,Lamp,7.5\n")
    config = ServingConfig(model, gallery, str(tmp_path / "serving"), threshold=path)
    config = replace(config, metadata=str(table), columns=("title", "price:number"))
    output = export_serving(config)
    values = {("big", ""): ("Chair", 20.0), ("p3", "3/1.jpg"): ("Lamp", 7.5)}
    answers = run_client(output, queries)
    accepted = threshold.accepts(best)
    assert 5 < accepted.sum() < len(queries) - 5
    for answer, row, is_match in zip(answers, best.rows, accepted, strict=True):
        assert (answer != "no match") == is_match
        if is_match:
            product, image = stored.products[row], stored.images[row]
            title, price = values.get((product, image), values.get((product, ""), (None, None)))
            assert len(answer) == 5
            assert answer[0] == {
                "id": row, "image": image, "product": product, "category": None, "title": title, "price": price,
            }  # fmt: skip
    written = json.loads((output / "threshold.json").read_text())
    assert (written["max_false_accept"], written["confidence"], written["products"]) == (0.01, 0.95, 16)
    assert written["results"] == (1 if score == "similarity" else 13)
    assert "at most 1 % get a match, with 95 % confidence" in (output / "README.md").read_text()
    parents = load_artifact(output, "serving").card.parents
    assert [parent.role for parent in parents] == ["onnx", "embeddings", "threshold"]
    # A copy of the inputs is the same hand-off, other values are not.
    before = load_artifact(output).sha256
    moved = str(table.rename(tmp_path / "moved.csv"))
    assert load_artifact(export_serving(replace(config, metadata=moved))).sha256 == before
    Path(moved).write_text("product,title,price\nbig,Stool,20\n")
    assert load_artifact(export_serving(replace(config, metadata=moved))).sha256 != before


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_client_of_a_gallery_with_few_images(index: Any, tmp_path: Path) -> None:
    """faiss fills the list of results with -1, which would be the last row."""
    model, gallery = write_served_model(tmp_path, 8), write_shop(tmp_path / "few", name_images(3), unit_vectors(3))
    output = export_serving(ServingConfig(model, gallery, str(tmp_path / "serving"), index=index))
    answers = run_client(output, unit_vectors(2, seed=1))
    assert [sorted(row["id"] for row in answer) for answer in answers] == [[0, 1, 2]] * 2


def test_hand_off_without_new_options_is_that_of_earlier_versions(tmp_path: Path) -> None:
    model = write_served_model(tmp_path, 8)
    gallery, queries = write_uneven_shop(tmp_path)
    output = export_serving(ServingConfig(model, gallery, str(tmp_path / "serving")))
    assert set(load_artifact(output).card.config) == {
        *("model", "gallery", "name", "max_batch", "preferred_batches", "queue_delay_us", "instances", "device"),
        "index",
    }
    names = sorted(str(path.relative_to(output)) for path in (output / "gallery").iterdir())
    assert names == ["gallery/index.faiss", "gallery/rows.parquet", "gallery/vectors.npy"]
    expected = np.argsort(-queries.astype(np.float64) @ load_embeddings(gallery).vectors.T, axis=1)[:, :5]
    assert [[row["id"] for row in answer] for answer in run_client(output, queries)] == expected.tolist()


def test_threshold_that_may_not_hold_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = write_served_model(tmp_path, 8)
    student = load_artifact(tmp_path / "student")
    gallery, _ = write_uneven_shop(tmp_path)

    def warnings(threshold: StoredThreshold, **changes: Any) -> str:
        caplog.clear()
        path = write_threshold(tmp_path / "threshold", student, threshold)
        export_serving(replace(ServingConfig(model, gallery, str(tmp_path / "s"), threshold=path), **changes))
        return "".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")

    by_student = "confirmed for queries of 'student', the server embeds them with 'fp32'"
    even = warnings(StoredThreshold("margin", 0.1, FITTED, 8))
    assert by_student in even
    text = (tmp_path / "s" / "README.md").read_text()
    assert "queries with fp32, for which the bound was not confirmed" in text
    assert "false accepts may exceed the bound" not in text
    assert "gallery of" not in even
    assert "gallery of 7 products, this one has 16" in warnings(StoredThreshold("margin", 0.1, FITTED, 7))
    assert "index that misses the second" in warnings(StoredThreshold("margin", 0.1, FITTED, 8), index="hnsw")
    assert "false accepts may exceed the bound" in (tmp_path / "s" / "README.md").read_text()
    assert "index that misses" not in warnings(StoredThreshold("similarity", 0.1, FITTED, 8), index="hnsw")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": "OTHER"}, "the threshold is of model 'other', the embeddings are of 'student'"),
        ({"threshold": "OWN", "gallery": "SINGLE"}, "the gallery has a single product, and its margin needs two"),
        ({"metadata": "TABLE", "columns": ("price:number",)}, "no row is of a product in"),
        ({"metadata": "TABLE", "columns": ("title",)}, "column 'title' is missing"),
        ({"metadata": "TABLE"}, "columns: --metadata and --columns need each other"),
    ],
)
def test_bad_input_is_one_line_without_output(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = write_served_model(tmp_path, 8)
    gallery, _ = write_uneven_shop(tmp_path)
    (tmp_path / "table.csv").write_text("product,price\nunknown,1\n")
    threshold = StoredThreshold("margin", 0.1, FITTED, 16)
    other: Artifact = write_model(tmp_path, "other")
    paths = {
        "OTHER": write_threshold(tmp_path / "foreign", other, threshold),
        "OWN": write_threshold(tmp_path / "own", load_artifact(tmp_path / "student"), threshold),
        "SINGLE": write_shop(tmp_path / "single", name_images(3), unit_vectors(3)),
        "TABLE": str(tmp_path / "table.csv"),
    }
    values = {key: paths.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    arguments = {"model": model, "gallery": gallery, "output": str(tmp_path / "serving"), **values}
    with pytest.raises(UserError, match=message):
        export_serving(ServingConfig(**arguments))
    assert not (tmp_path / "serving").exists()


def test_bound_of_a_threshold_is_loaded(tmp_path: Path) -> None:
    """Galleries store it, and those of earlier versions have none."""
    student = write_model(tmp_path, "student")
    for bound in ((0.01, 0.95), (None, None)):
        threshold = StoredThreshold("margin", 0.1, FITTED, 16, *bound)
        path = write_threshold(tmp_path / "threshold", student, threshold)
        assert load_threshold(path, student.as_parent("model"), 8) == threshold
