from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from vpr.artifacts.card import Embedding, Parent
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog
from vpr.retrieval.config import RerankConfig, SearchConfig
from vpr.retrieval.embeddings import write_embeddings
from vpr.retrieval.rerank import rank
from vpr.retrieval.search_command import search_gallery


def unit_vectors(count: int, dim: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_artifacts(path: Path, vectors: NDArray[np.float32], roles: list[str], model: str = "model") -> str:
    """Write an embeddings artifact and its model; images are named by their row."""
    rows = [{"image": f"{n}.jpg", "product": f"p[{n % 7}]", "role": role} for n, role in enumerate(roles)]
    with write_artifact(path.parent / model, "teacher", {"name": model}) as draft:
        (draft.path / "x").write_text(model)
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), path.parent)
    write_embeddings(str(path), vectors, catalog, load_artifact(path.parent / model), {})
    return str(path)


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[str, NDArray[np.float32], NDArray[np.bool_]]:
    """1,010 gallery images and 12 queries in random order."""
    vectors = unit_vectors(1022, 8, 0)
    is_query = np.zeros(1022, dtype=bool)
    is_query[np.random.default_rng(1).permutation(1022)[:12]] = True
    path = write_artifacts(tmp_path / "e", vectors, ["query" if q else "gallery" for q in is_query])
    return path, vectors, is_query


@pytest.mark.parametrize("rerank", [RerankConfig(), RerankConfig(dba=3, qe=2)])
def test_submission_lists_gallery_indices(
    rerank: RerankConfig, mixed: tuple[str, NDArray[np.float32], NDArray[np.bool_]], tmp_path: Path
) -> None:
    path, vectors, is_query = mixed
    out = tmp_path / "submission.npy"
    search_gallery(SearchConfig(path, path, rerank=rerank, submission=str(out)))
    ranking = np.load(out, allow_pickle=False)
    assert ranking.shape == (12, 1000)
    assert ranking.dtype == np.int64
    assert all(len(set(row)) == 1000 for row in ranking.tolist())
    assert ranking.min() >= 0
    assert ranking.max() < 1010
    np.testing.assert_array_equal(ranking, rank(vectors[is_query], vectors[~is_query], rerank, 1000)[1])
    if rerank == RerankConfig():
        np.testing.assert_array_equal(ranking[:, 0], (vectors[is_query] @ vectors[~is_query].T).argmax(axis=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "model", "submission.npy"]


def test_results_are_written_as_csv(
    mixed: tuple[str, NDArray[np.float32], NDArray[np.bool_]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, vectors, is_query = mixed
    search_gallery(SearchConfig(path, path, output=str(tmp_path / "results.csv"), k=3))
    with (tmp_path / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 12 * 3
    first, gallery = np.flatnonzero(is_query)[0], np.flatnonzero(~is_query)
    best = gallery[(vectors[gallery] @ vectors[first]).argmax()]
    assert rows[0]["query"] == f"{first}.jpg"
    assert rows[0]["image"] == f"{best}.jpg"
    assert float(rows[0]["score"]) == pytest.approx(float(vectors[best] @ vectors[first]), abs=1e-5)
    assert f"p[{first % 7}]" in capsys.readouterr().out  # not interpreted as markup


def test_output_and_submission_must_differ(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="submission: .* is the output file too"):
        SearchConfig("q", "g", output=str(tmp_path / "results"), submission=f"{tmp_path}/./results")


@pytest.mark.parametrize("key", ["output", "submission"])
def test_output_that_is_no_plain_file_is_rejected(tmp_path: Path, key: str) -> None:
    """As root, /dev/null would be replaced otherwise."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link", "absent/results.csv"):
        with pytest.raises(UserError, match=f"^{key}: "):
            SearchConfig("q", "g", **{key: str(tmp_path / name)})


def test_submission_needs_a_large_gallery(tmp_path: Path) -> None:
    path = write_artifacts(tmp_path / "e", unit_vectors(20, 4, 0), ["gallery"] * 15 + ["query"] * 5)
    with pytest.raises(UserError, match="submission: expected a gallery of 1000 images or more, got 15"):
        search_gallery(SearchConfig(path, path, submission=str(tmp_path / "s.npy")))
    assert not (tmp_path / "s.npy").exists()


@pytest.mark.parametrize(
    ("k", "expected"), [(0, "^k: expected .+ got 0"), (-3, "^k: .*-3"), (16, r"^k: expected 1 to 15 .*, got 16")]
)
def test_k_beyond_the_gallery_is_rejected(k: int, expected: str, tmp_path: Path) -> None:
    path = write_artifacts(tmp_path / "e", unit_vectors(20, 4, 0), ["gallery"] * 15 + ["query"] * 5)
    for rerank in (RerankConfig(), RerankConfig(k_reciprocal=True)):
        with pytest.raises(UserError, match=expected):
            search_gallery(SearchConfig(path, path, k=k, rerank=rerank))


def test_embeddings_of_two_models_are_rejected(tmp_path: Path) -> None:
    first = write_artifacts(tmp_path / "a", unit_vectors(9, 4, 0), ["query"] * 9, model="one")
    second = write_artifacts(tmp_path / "b", unit_vectors(9, 4, 0), ["gallery"] * 9, model="two")
    with pytest.raises(UserError, match="embedded with 'one', the gallery with 'two'"):
        search_gallery(SearchConfig(first, second))


def test_invalid_embeddings_are_rejected(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "junk", "embeddings", {}, [Parent(role="model", name="m", sha256="0")]) as draft:
        (draft.path / "vectors.npy").write_bytes(b"junk")
        (draft.path / "rows.parquet").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk: .*embeddings"):
        search_gallery(SearchConfig(str(tmp_path / "junk"), str(tmp_path / "junk")))
    vectors = unit_vectors(3, 4, 0)
    good = write_artifacts(tmp_path / "good", vectors, ["gallery"] * 3)
    with write_artifact(tmp_path / "orphan", "embeddings", {}) as draft:
        for name in ("vectors.npy", "rows.parquet"):
            (draft.path / name).write_bytes((Path(good) / name).read_bytes())
        draft.embedding = Embedding(dim=4, normalised=True, dtype="float32")
    with pytest.raises(UserError, match="the card names no model"):
        search_gallery(SearchConfig(str(tmp_path / "orphan"), str(tmp_path / "orphan")))


def test_control_characters_are_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with write_artifact(tmp_path / "model", "teacher", {}) as draft:
        (draft.path / "x").write_text("model")
    rows = [{"image": f"{n}.jpg", "product": "a\x1b[2Jb", "role": role} for n, role in enumerate(["query", "gallery"])]
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path)
    path = str(tmp_path / "embeddings")
    write_embeddings(path, unit_vectors(2, 8, 0), catalog, load_artifact(tmp_path / "model"), {})
    search_gallery(SearchConfig(path, path, k=1))
    printed = capsys.readouterr().out
    assert "a\ufffd[2Jb" in printed
    assert "\x1b" not in printed
