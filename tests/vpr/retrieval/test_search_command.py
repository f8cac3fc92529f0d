from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from vpr.artifacts.store import Embedding, Parent, load_artifact, write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog
from vpr.retrieval.config import RerankConfig, SearchConfig
from vpr.retrieval.embeddings import write_embeddings
from vpr.retrieval.rerank import rank
from vpr.retrieval.search_command import search_gallery


def unit(count: int, dim: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def embeddings(path: Path, vectors: NDArray[np.float32], roles: list[str], model: str = "model") -> str:
    """An embeddings artifact; images are named by their row."""
    rows = [{"image": f"{n}.jpg", "product": f"p[{n % 7}]", "role": role} for n, role in enumerate(roles)]
    with write_artifact(path.parent / model, "teacher", {"name": model}) as draft:
        (draft.path / "x").write_text(model)
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), path.parent)
    write_embeddings(str(path), vectors, catalog, load_artifact(path.parent / model), {})
    return str(path)


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[str, NDArray[np.float32], NDArray[np.bool_]]:
    """1,010 gallery images and 12 queries among them, in no order."""
    vectors = unit(1022, 8, 0)
    asked = np.zeros(1022, dtype=bool)
    asked[np.random.default_rng(1).permutation(1022)[:12]] = True
    path = embeddings(tmp_path / "e", vectors, ["query" if q else "gallery" for q in asked])
    return path, vectors, asked


@pytest.mark.parametrize("rerank", [RerankConfig(), RerankConfig(dba=3, qe=2)])
def test_a_submission_lists_gallery_indices_best_first(
    rerank: RerankConfig, mixed: tuple[str, NDArray[np.float32], NDArray[np.bool_]], tmp_path: Path
) -> None:
    path, vectors, asked = mixed
    out = tmp_path / "submission.npy"
    search_gallery(SearchConfig(path, path, rerank=rerank, submission=str(out)))
    found = np.load(out, allow_pickle=False)
    assert found.shape == (12, 1000)
    assert found.dtype == np.int64
    assert all(len(set(row)) == 1000 for row in found.tolist())
    assert found.min() >= 0
    assert found.max() < 1010
    np.testing.assert_array_equal(found, rank(vectors[asked], vectors[~asked], rerank, 1000)[1])
    if rerank == RerankConfig():
        np.testing.assert_array_equal(found[:, 0], (vectors[asked] @ vectors[~asked].T).argmax(axis=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "model", "submission.npy"]


def test_results_are_written_as_csv_with_the_gallery_s_names(
    mixed: tuple[str, NDArray[np.float32], NDArray[np.bool_]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, vectors, asked = mixed
    search_gallery(SearchConfig(path, path, output=str(tmp_path / "results.csv"), k=3))
    with (tmp_path / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 12 * 3
    first, gallery = np.flatnonzero(asked)[0], np.flatnonzero(~asked)
    best = gallery[(vectors[gallery] @ vectors[first]).argmax()]
    assert rows[0]["query"] == f"{first}.jpg"
    assert rows[0]["image"] == f"{best}.jpg"
    assert float(rows[0]["score"]) == pytest.approx(float(vectors[best] @ vectors[first]), abs=1e-5)
    assert f"p[{first % 7}]" in capsys.readouterr().out  # shown as it is, not read as markup


def test_one_file_does_not_take_both_the_results_and_the_submission(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="submission: .* is the output too: name another file"):
        SearchConfig("q", "g", output=str(tmp_path / "found"), submission=f"{tmp_path}/./found")


@pytest.mark.parametrize("key", ["output", "submission"])
def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path, key: str) -> None:
    """As root, /dev/null would be."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link", "absent/found.csv"):
        with pytest.raises(UserError, match=f"{key}: .* is no file in a folder that exists"):
            SearchConfig("q", "g", **{key: str(tmp_path / name)})


def test_a_small_gallery_has_no_submission(tmp_path: Path) -> None:
    path = embeddings(tmp_path / "e", unit(20, 4, 0), ["gallery"] * 15 + ["query"] * 5)
    with pytest.raises(UserError, match="submission: 1000 different images .* the gallery has 15"):
        search_gallery(SearchConfig(path, path, submission=str(tmp_path / "s.npy")))
    assert not (tmp_path / "s.npy").exists()


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (0, "k: expected 1 or more, got 0"),
        (-3, "k: expected 1 or more, got -3"),
        (16, "search: k is 16, the gallery has 15"),
    ],
)
def test_more_results_than_images_are_refused(k: int, expected: str, tmp_path: Path) -> None:
    path = embeddings(tmp_path / "e", unit(20, 4, 0), ["gallery"] * 15 + ["query"] * 5)
    for rerank in (RerankConfig(), RerankConfig(k_reciprocal=True)):
        with pytest.raises(UserError, match=expected):
            search_gallery(SearchConfig(path, path, k=k, rerank=rerank))


def test_two_models_are_not_compared(tmp_path: Path) -> None:
    first = embeddings(tmp_path / "a", unit(9, 4, 0), ["query"] * 9, model="one")
    second = embeddings(tmp_path / "b", unit(9, 4, 0), ["gallery"] * 9, model="two")
    with pytest.raises(UserError, match="embedded with 'one', the gallery with 'two'"):
        search_gallery(SearchConfig(first, second))


def test_embeddings_written_wrong_are_named(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "junk", "embeddings", {}, [Parent(role="model", name="m", sha256="0")]) as draft:
        (draft.path / "vectors.npy").write_bytes(b"junk")
        (draft.path / "rows.parquet").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk: is no usable embeddings"):
        search_gallery(SearchConfig(str(tmp_path / "junk"), str(tmp_path / "junk")))
    vectors = unit(3, 4, 0)
    good = embeddings(tmp_path / "good", vectors, ["gallery"] * 3)
    with write_artifact(tmp_path / "orphan", "embeddings", {}) as draft:
        for name in ("vectors.npy", "rows.parquet"):
            (draft.path / name).write_bytes((Path(good) / name).read_bytes())
        draft.embedding = Embedding(dim=4, normalised=True, dtype="float32")
    with pytest.raises(UserError, match="its card names no model"):
        search_gallery(SearchConfig(str(tmp_path / "orphan"), str(tmp_path / "orphan")))


def test_a_product_s_name_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with write_artifact(tmp_path / "model", "teacher", {}) as draft:
        (draft.path / "x").write_text("model")
    rows = [{"image": f"{n}.jpg", "product": "a\x1b[2Jb", "role": role} for n, role in enumerate(["query", "gallery"])]
    catalog = Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path)
    path = str(tmp_path / "embeddings")
    write_embeddings(path, unit(2, 8, 0), catalog, load_artifact(tmp_path / "model"), {})
    search_gallery(SearchConfig(path, path, k=1))
    printed = capsys.readouterr().out
    assert "a\ufffd[2Jb" in printed
    assert "\x1b" not in printed
