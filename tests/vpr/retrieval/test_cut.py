from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from export.config import EmbedConfig as AnyModelConfig
from export.embed import embed_catalog as embed_with_any
from student.embed import EmbedConfig, embed_catalog
from vpr.artifacts.card import Embedding
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.config import SearchConfig
from vpr.retrieval.cut import cut_vectors
from vpr.retrieval.embeddings import load_embeddings
from vpr.retrieval.search_command import search_gallery


def embedded(model: Path, catalog: Catalog, folder: Path, dimensions: int) -> Path:
    assert catalog.artifact is not None
    values = {"split": "test", "dimensions": dimensions}
    return embed_catalog(EmbedConfig(str(model), str(catalog.artifact.path), str(folder / f"e{dimensions}"), **values))


def test_prefix_has_unit_length() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    cut = cut_vectors(vectors, 3)
    for row, full in zip(cut, vectors.astype(np.float64), strict=True):
        np.testing.assert_allclose(row, full[:3] / np.sqrt(full[0] ** 2 + full[1] ** 2 + full[2] ** 2), rtol=1e-6)
    assert cut_vectors(vectors, 0) is vectors
    with pytest.raises(UserError, match="zero or non-finite"):
        cut_vectors(np.array([[0, 0, 1]], np.float32), 2)


def test_embedding_lists_the_prefixes_below_a_cut() -> None:
    full = Embedding(dim=256, normalised=True, dtype="float32", nested=[32, 64, 128])
    assert full.cut(64) == Embedding(dim=64, normalised=True, dtype="float32", nested=[32])
    assert full.cut(256) == full


def test_embeddings_are_cut(
    student_artifact: Path, catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = load_embeddings(embedded(student_artifact, catalog, tmp_path, 0))
    capsys.readouterr()
    cut = load_embeddings(embedded(student_artifact, catalog, tmp_path, 8))
    name = load_artifact(student_artifact).card.name
    assert f"dimensions: {name} was not trained for 8 (nested dimensions: none)" in capsys.readouterr().err
    expected = full.vectors[:, :8] / np.linalg.norm(full.vectors[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut.vectors, expected, atol=1e-6)
    assert "dimensions" not in full.artifact.card.config
    assert cut.artifact.card.config["dimensions"] == 8
    assert cut.artifact.card.embedding is not None
    assert cut.artifact.card.embedding.dim == 8
    assert catalog.artifact is not None
    config = AnyModelConfig(
        str(student_artifact), str(catalog.artifact.path), str(tmp_path / "any"), "test", dimensions=8
    )
    np.testing.assert_allclose(load_embeddings(embed_with_any(config)).vectors, cut.vectors, atol=1e-6)


def test_different_cuts_are_not_compared(student_artifact: Path, catalog: Catalog, tmp_path: Path) -> None:
    paths = [str(embedded(student_artifact, catalog, tmp_path, dimensions)) for dimensions in (4, 8)]
    with pytest.raises(UserError, match=r"e4: 4 dimensions, the gallery has 8\. Embed both with the same --dimensions"):
        search_gallery(SearchConfig(*paths))
    assert search_gallery(SearchConfig(paths[0], paths[0], str(tmp_path / "hits.csv"))) is not None


def test_more_dimensions_than_the_model_has_are_rejected(
    student_artifact: Path, catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match=r"dimensions: expected at most the 32 of .* 33"):
        embedded(student_artifact, catalog, tmp_path, 33)
    assert not (tmp_path / "e33").exists()
