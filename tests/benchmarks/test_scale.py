from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.config import KINDS, ScaleConfig
from benchmarks.scale import measure_scale, measure_scale_table, neighbour_recall
from benchmarks.synthetic_gallery import Gallery, grow_gallery
from experiments.latency.scale import largest, table_row
from student.embed import EmbedConfig, embed_catalog
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import l2_normalize

DIM, PRODUCTS, IMAGES = 32, 40, 12


@pytest.fixture(scope="module")
def real() -> Gallery:
    """Gallery whose products are clusters; the first two images of each are queries."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(PRODUCTS, 1, DIM))
    vectors = centres + 0.4 * rng.normal(size=(PRODUCTS, IMAGES, DIM))
    codes = np.repeat(np.arange(PRODUCTS, dtype=np.int32), IMAGES).reshape(PRODUCTS, IMAGES)
    flat = [l2_normalize(part.reshape(-1, DIM).astype(np.float32)) for part in (vectors[:, 2:], vectors[:, :2])]
    return Gallery(flat[0], codes[:, 2:].ravel(), flat[1], codes[:, :2].ravel())


def nearest(queries: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row and cosine of the nearest other vector, by a matrix product."""
    cosines = queries @ gallery.T
    cosines[cosines > 1 - 1e-5] = -1
    return cosines.argmax(axis=1), cosines.max(axis=1)


def test_grown_gallery_keeps_the_neighbourhoods(real: Gallery) -> None:
    grown = grow_gallery(real, 3000, seed=1)
    count = len(real.vectors)
    assert np.array_equal(grown.vectors[:count], real.vectors)
    assert np.allclose(np.linalg.norm(grown.vectors, axis=1), 1, atol=1e-5)
    sources, cosine = nearest(grown.vectors[count:].copy(), real.vectors)
    assert (real.products[sources] == grown.products[count:]).mean() > 0.95
    assert abs(np.median(cosine) - np.median(nearest(real.vectors.copy(), real.vectors)[1])) < 0.1
    assert len(np.unique(grown.vectors[count:], axis=0)) == 3000 - count


def test_growth_is_seeded_and_keeps_the_prefix(real: Gallery) -> None:
    large, small = grow_gallery(real, 70_000, seed=1), grow_gallery(real, 1000, seed=1)
    assert np.array_equal(large.vectors[:1000], small.vectors)
    assert np.array_equal(large.products[:1000], small.products)
    assert not np.array_equal(grow_gallery(real, 1000, seed=2).vectors, small.vectors)


@pytest.mark.slow
def test_every_index_is_compared_with_exact_search(real: Gallery) -> None:
    config = ScaleConfig("", "", sizes=(1000, 4000), queries=80, batch=32, seconds=0.01)
    rows = {(row.size, row.kind): row for row in measure_scale(config, real)}
    assert list(rows) == [(size, kind) for size in config.sizes for kind in KINDS]
    for size in config.sizes:
        flat = rows[size, "flat"]
        assert (flat.recall_at_1, flat.recall_at_10) == (1.0, 1.0)
        bytes_of = {kind: rows[size, kind].index_bytes for kind in KINDS}
        assert bytes_of["flat"] == pytest.approx(4 * DIM * size, abs=200)
        assert bytes_of["flat-fp16"] == pytest.approx(2 * DIM * size, abs=200)
        assert bytes_of["flat-int8"] == pytest.approx(DIM * size, abs=600)
        assert bytes_of["hnsw"] > bytes_of["flat"]
        assert rows[size, "flat-fp16"].recall_at_10 > 0.99
        assert 0.9 < rows[size, "flat-int8"].recall_at_10 <= 1
        assert rows[size, "ivf-pq"].recall_at_10 < rows[size, "ivf-flat"].recall_at_10
        assert all(row.batch_ms and min(row.batch_ms.values()) > 0 for row in rows.values())
    grown = grow_gallery(real, 4000, config.seed)
    first = (grown.queries @ grown.vectors.T).argmax(axis=1)
    assert rows[4000, "flat"].product_recall_at_1 == pytest.approx(
        (grown.products[first] == grown.query_products).mean()
    )


def test_slow_index_is_skipped_with_the_reason(real: Gallery) -> None:
    config = ScaleConfig("", "", sizes=(1000, 2000), kinds=("flat", "hnsw"), seconds=0.01, build_seconds=1e-9)
    rows = list(measure_scale(config, real))
    assert [row.recall_at_1 is None for row in rows] == [False, False, True, True]
    assert "not built: expected" in rows[3].notes


def test_ties_are_right_and_missing_results_wrong() -> None:
    vectors = np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 1]], dtype=np.float32)
    gallery = Gallery(vectors, np.zeros(4, np.int32), vectors[:1], np.zeros(1, np.int32))
    exact = np.array([[1, 1]], dtype=np.float32)
    assert neighbour_recall(gallery, np.array([[1, 0]]), exact) == (1.0, 1.0)
    assert neighbour_recall(gallery, np.array([[2, 1]]), exact) == (0.0, 0.5)
    assert neighbour_recall(gallery, np.array([[0, -1]]), exact) == (1.0, 0.5)
    assert neighbour_recall(gallery, np.array([[-1, -1]]), exact) == (0.0, 0.0)


def test_command_writes_its_table(catalog: Catalog, student_artifact: Path, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    vectors = str(tmp_path / "vectors")
    embed_catalog(EmbedConfig(str(student_artifact), str(catalog.artifact.path), vectors))
    config = ScaleConfig(vectors, str(tmp_path / "scale"), sizes=(150,), kinds=("flat", "hnsw"), seconds=0.01)
    artifact = load_artifact(measure_scale_table(config), "report")
    rows = json.loads(artifact.file("scale.json").read_text(encoding="utf-8"))
    assert [(row["size"], row["kind"]) for row in rows] == [(150, "flat"), (150, "hnsw")]
    assert [figure.value for figure in largest(rows, "make")[1:3]] == [1.0, 0.0]
    assert table_row(rows[0])["recall@10"] == "1.000"
    assert table_row({**rows[0], "single_ms": None, "notes": "too long"})["product recall@1"] == "too long"
    with pytest.raises(UserError, match="sizes: expected 96 or more.*got 50"):
        measure_scale_table(ScaleConfig(vectors, str(tmp_path / "scale"), sizes=(50,)))
    embed_catalog(EmbedConfig(str(student_artifact), str(catalog.artifact.path), vectors, split="train"))
    with pytest.raises(UserError, match="expected query and other images"):
        measure_scale_table(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ()}, "sizes"),
        ({"sizes": (20, 10)}, "sizes"),
        ({"batch": 0}, "batch: "),
        ({"ef_search": 0}, "ef_search: "),
    ],
)
def test_scale_config_out_of_range_is_rejected(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScaleConfig("", "", **settings)  # type: ignore[arg-type]


def test_gallery_smaller_than_an_index_needs_is_noted(tmp_path: Path) -> None:
    """A product quantiser trains 256 codes; the dimension 30 has no 7 equal parts."""
    vectors = l2_normalize(np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32))
    products = np.arange(40, dtype=np.int32) % 8
    real = Gallery(vectors[:20], products[:20], vectors[20:], products[20:])
    config = ScaleConfig("e", str(tmp_path), sizes=(20, 300), kinds=("ivf-pq",), seconds=0.0)
    small, large = measure_scale(config, real)
    assert small.notes == "not built: its training needs 256 vectors"
    assert large.recall_at_10 is not None
