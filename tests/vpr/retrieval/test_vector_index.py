from __future__ import annotations

import itertools
from typing import get_args

import faiss
import numpy as np
import pytest

from vpr.common.errors import UserError
from vpr.retrieval.config import INDEX_KINDS, VECTOR_FORMATS, IndexTuning, Reduction
from vpr.retrieval.embeddings import l2_normalize
from vpr.retrieval.vector_index import (
    StorageSetting,
    build_index,
    check_vectors,
    count_lists,
    fit_reduction,
    is_possible,
    measure_bytes,
    reduce_vectors,
)

WIDTH = 32
TUNING = IndexTuning(nprobe=4, ef_search=64, shortlist=40)


def draw(count: int, seed: int) -> np.ndarray:
    """Return unit vectors with unequal variances and a mean."""
    rng = np.random.default_rng(seed)
    return l2_normalize((rng.normal(size=(count, WIDTH)) * np.linspace(0.3, 2, WIDTH) + 0.3).astype(np.float32))


TRAINING, GALLERY, QUERIES = draw(400, 0), draw(300, 1), draw(20, 2)


def test_int8_scores_are_those_of_a_loop_over_dimensions() -> None:
    """Each dimension has 256 steps between its smallest and largest training value."""
    setting = StorageSetting(WIDTH, None, "int8", "flat")
    scores, rows = build_index(setting, TRAINING, GALLERY, TUNING).search(QUERIES, 300)
    low, high = TRAINING.min(axis=0).astype(np.float64), TRAINING.max(axis=0).astype(np.float64)
    decoded = np.empty(GALLERY.shape)
    for row in range(len(GALLERY)):
        for dim in range(WIDTH):
            share = min(max((GALLERY[row, dim] - low[dim]) / (high[dim] - low[dim]), 0), 1)
            code = min(int(share * 255), 255)
            decoded[row, dim] = low[dim] + (code + 0.5) / 255 * (high[dim] - low[dim])
    for query in range(len(QUERIES)):
        expected = decoded @ QUERIES[query].astype(np.float64)
        assert np.abs(expected[rows[query]] - scores[query]).max() < 2e-3
        assert expected.argmax() == rows[query, 0] or expected.max() - expected[rows[query, 0]] < 2e-3
    inside = (low <= GALLERY) & (high >= GALLERY)
    assert np.abs(decoded - GALLERY)[inside].max() <= ((high - low) / 255).max()


def test_ranges_come_from_the_training_vectors_only() -> None:
    setting = StorageSetting(WIDTH, None, "int8", "flat")
    first = build_index(setting, TRAINING, GALLERY, TUNING)
    second = build_index(setting, TRAINING, draw(50, 9), TUNING)
    trained = [faiss.vector_to_array(index.sq.trained) for index in (first, second)]
    assert np.array_equal(*trained)
    assert np.allclose(trained[0][:WIDTH], TRAINING.min(axis=0))


def test_binary_ranks_by_the_bits_that_differ() -> None:
    setting = StorageSetting(WIDTH, None, "binary", "flat")
    distances, rows = build_index(setting, TRAINING, GALLERY, TUNING).search(QUERIES, 10)
    transforms = fit_reduction(setting, TRAINING)
    training, gallery, queries = (reduce_vectors(transforms, part) for part in (TRAINING, GALLERY, QUERIES))
    thresholds = [np.median(training[:, dim]) for dim in range(WIDTH)]
    for query in range(len(QUERIES)):
        differing = [
            sum((queries[query, dim] >= thresholds[dim]) != (vector[dim] >= thresholds[dim]) for dim in range(WIDTH))
            for vector in gallery
        ]
        assert distances[query].tolist() == sorted(differing)[:10]
        assert [differing[row] for row in rows[query]] == sorted(differing)[:10]


def test_rabitq_estimates_the_cosines() -> None:
    """Its estimates are unbiased, and each bit more about halves their errors."""
    spreads = []
    for form in ("rabitq4", "rabitq3", "rabitq2"):
        setting = StorageSetting(WIDTH, None, form, "flat")  # type: ignore[arg-type]
        scores, rows = build_index(setting, TRAINING, GALLERY, TUNING).search(QUERIES, len(GALLERY))
        errors = scores - np.take_along_axis(QUERIES @ GALLERY.T, rows, axis=1)
        spreads.append(float(errors.std()))
        assert abs(errors.mean()) < 0.1 * spreads[-1]
    assert spreads[0] < 0.03
    assert all(1.5 < few / many < 3 for many, few in itertools.pairwise(spreads))


@pytest.mark.parametrize(("form", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_flat_float_formats_are_exact_search(form: str, tolerance: float) -> None:
    setting = StorageSetting(WIDTH, None, form, "flat")  # type: ignore[arg-type]
    scores, rows = build_index(setting, TRAINING, GALLERY, TUNING).search(QUERIES, 5)
    exact = np.sort(QUERIES @ GALLERY.T, axis=1)[:, ::-1][:, :5]
    assert np.abs(scores - exact).max() < tolerance
    assert np.abs(np.take_along_axis(QUERIES @ GALLERY.T, rows, axis=1) - exact).max() < tolerance


@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_reduced_index_searches_the_reduced_vectors(reduction: Reduction) -> None:
    """Principal directions are those of a singular value decomposition about the origin."""
    setting = StorageSetting(8, reduction, "float32", "flat")
    projection = np.eye(WIDTH)[:, :8]
    if reduction == "pca":
        projection = np.linalg.svd(TRAINING.astype(np.float64), full_matrices=False)[2][:8].T
    gallery, queries = (part @ projection for part in (GALLERY, QUERIES))
    gallery, queries = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (gallery, queries))
    scores, rows = build_index(setting, TRAINING, GALLERY, TUNING).search(QUERIES, 3)
    exact = queries @ gallery.T
    assert np.abs(scores - np.sort(exact, axis=1)[:, ::-1][:, :3]).max() < 1e-4
    assert np.abs(np.take_along_axis(exact, rows, axis=1) - scores).max() < 1e-4


def test_principal_directions_are_nested() -> None:
    few, many = (fit_reduction(StorageSetting(dims, "pca", "float32", "flat"), TRAINING)[0] for dims in (4, 16))
    first, all_directions = faiss.vector_to_array(few.A), faiss.vector_to_array(many.A)
    assert np.allclose(first, all_directions[: 4 * WIDTH], atol=1e-6)


@pytest.mark.parametrize(
    ("form", "index"),
    [(form, index) for form in VECTOR_FORMATS for index in INDEX_KINDS if is_possible(form, index)],
)
def test_every_setting_is_stored_and_found_again(form: str, index: str) -> None:
    """A written and read index answers as before; bytes are those of the file."""
    rescoring, found = "float32" if "shortlist" in index else None, {"pq": 0.6, "rabitq2": 0.8}
    setting = StorageSetting(16, "pca", form, index, rescoring)  # type: ignore[arg-type]
    built = build_index(setting, TRAINING, GALLERY, TUNING)
    scores, rows = built.search(GALLERY[:50], 3)
    data = faiss.serialize_index(built)
    assert len(data) == measure_bytes(built)
    again = faiss.deserialize_index(data).search(GALLERY[:50], 3)
    assert np.array_equal(again[1], rows)
    assert np.allclose(again[0], scores)
    if form != "binary" or rescoring:  # a vector is nearest to itself, but for coarse codes
        assert (rows[:, 0] == np.arange(50)).mean() > (0.95 if rescoring else found.get(form, 0.95))


def test_bytes_are_those_of_the_format() -> None:
    bytes_of = {
        form: measure_bytes(build_index(StorageSetting(WIDTH, None, form, "flat"), TRAINING, GALLERY, TUNING))
        for form in ("float32", "float16", "int8", "rabitq3")
    }
    assert bytes_of["float32"] == pytest.approx(300 * WIDTH * 4, abs=200)
    assert bytes_of["float16"] == pytest.approx(300 * WIDTH * 2, abs=200)
    assert bytes_of["int8"] == pytest.approx(300 * WIDTH + WIDTH * 8, abs=200)
    # The rotation is stored too, and SIMD blocks hold 32 vectors.
    assert bytes_of["rabitq3"] == pytest.approx(320 * (WIDTH * 3 / 8 + 20) + 4 * WIDTH**2, abs=600)


def test_lists_have_enough_training_vectors() -> None:
    assert count_lists(1_000_000, 1_000_000) == 1000
    assert count_lists(1_000_000, 390) == 10
    assert count_lists(100, 10) == 1


@pytest.mark.parametrize(
    ("setting", "count", "message"),
    [
        (StorageSetting(64, "pca", "int8", "flat"), 400, "dims: expected at most 32.*got 64"),
        (StorageSetting(16, "pca", "int8", "flat"), 10, "dims: 16 principal directions needs 16.*got 10"),
        (StorageSetting(16, "truncate", "pq", "flat"), 255, "formats: pq needs 256 training vectors, got 255"),
        (StorageSetting(16, "truncate", "int8", "ivf"), 38, "indexes: ivf needs 39 training vectors, got 38"),
    ],
)
def test_impossible_setting_is_one_line(setting: StorageSetting, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_index(setting, TRAINING[:count], GALLERY, TUNING)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (GALLERY[:, :8], "x: expected 32 dimensions, got 8"),
        (GALLERY * 2, "x: the vectors are not of length 1"),
        (np.where(GALLERY > 0.3, np.nan, GALLERY), "x: the vectors contain NaN or infinity"),
        (GALLERY.astype(np.float64), r"x: expected a \(n, 32\) float32 array"),
    ],
)
def test_unusable_vectors_are_one_line(vectors: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_vectors(vectors, "x", WIDTH)
