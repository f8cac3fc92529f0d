from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from experiments.gallery.embedding_statistics import Images, measure_statistics, statistics_row
from vpr.common.errors import UserError
from vpr.retrieval.embeddings import l2_normalize


@pytest.fixture(scope="module")
def images() -> Images:
    """Products of unequal sizes in three categories, of which one has a single product; 70 dimensions."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 8, 15)
    products = np.repeat(np.arange(15), sizes)
    centres = rng.normal(size=(15, 70)) + 0.3
    vectors = l2_normalize((centres[products] + rng.normal(size=(len(products), 70))).astype(np.float32))
    categories = np.array([0] * 7 + [1] * 7 + [2])[products]
    is_query = np.concatenate([np.arange(size) >= 2 for size in sizes])  # two gallery images, one query or more
    return Images(vectors, products.astype(np.str_), categories.astype(np.str_), is_query)


def test_shares_are_mean_cosines_of_pairs(images: Images) -> None:
    cosines = images.vectors.astype(float) @ images.vectors.T.astype(float)
    inner: dict[tuple[str, str], list[float]] = {}
    outer: dict[tuple[str, str], list[float]] = {}
    noise: dict[str, list[float]] = {}
    for first, second in itertools.permutations(range(len(cosines)), 2):
        one, two = images.products[first], images.products[second]
        if one == two:
            if not images.is_query[first] and not images.is_query[second]:
                noise.setdefault(one, []).append(cosines[first, second])
            continue
        pairs = inner if images.categories[first] == images.categories[second] else outer
        pairs.setdefault((one, two), []).append(cosines[first, second])
    mean_inner, mean_outer = (np.mean([np.mean(values) for values in pairs.values()]) for pairs in (inner, outer))
    mean_noise = np.mean([np.mean(values) for values in noise.values()])
    statistics = measure_statistics(images)
    assert statistics.common == pytest.approx(mean_outer, abs=1e-6)
    assert statistics.category == pytest.approx(mean_inner - mean_outer, abs=1e-6)
    assert statistics.gallery_noise == pytest.approx(1 - mean_noise, abs=1e-6)
    total = statistics.common + statistics.category + statistics.product + statistics.gallery_noise
    assert total == pytest.approx(1)


def test_margins_are_those_of_a_search(images: Images) -> None:
    statistics = measure_statistics(images)
    margins, others = [], []
    for query in np.flatnonzero(images.is_query):
        own = {True: [], False: []}
        for row in np.flatnonzero(~images.is_query):
            own[bool(images.products[row] == images.products[query])].append(
                float(images.vectors[query] @ images.vectors[row])
            )
        margins.append(max(own[True]) - max(own[False]))
        others.append(max(own[False]))
    assert statistics.margin == pytest.approx(np.quantile(margins, [0.1, 0.5, 0.9]), abs=1e-5)
    assert statistics.nearest_other == pytest.approx(np.quantile(others, [0.1, 0.5, 0.9]), abs=1e-5)
    assert statistics.recall_at_1 == pytest.approx(np.mean(np.array(margins) > 0))


def test_images_without_queries_search_each_other(images: Images) -> None:
    alone = replace(images, is_query=np.zeros(len(images.vectors), bool))
    statistics = measure_statistics(alone)
    cosines = images.vectors @ images.vectors.T
    np.fill_diagonal(cosines, -1)
    expected = (images.products[cosines.argmax(axis=1)] == images.products).mean()
    assert statistics.recall_at_1 == pytest.approx(expected)
    assert statistics.query_noise == statistics.gallery_noise


def test_decay_and_effective_dimensions_of_a_known_spectrum() -> None:
    rng = np.random.default_rng(0)
    variances = np.arange(1, 81) ** -1.5
    made = rng.normal(size=(3000, 80)) * np.sqrt(variances)
    products = np.arange(3000) // 3
    images = Images(
        made.astype(np.float32), products.astype(np.str_), (products // 10).astype(np.str_), np.zeros(3000, bool)
    )
    statistics = measure_statistics(images)
    assert statistics.decay == pytest.approx(1.5, abs=0.1)
    assert statistics.effective_dims == pytest.approx(variances.sum() ** 2 / (variances**2).sum(), rel=0.1)
    assert set(statistics_row("name", statistics)) >= {"embeddings", "decay", "recall@1", "margin"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": np.full(75, "one")}, "expected two categories"),
        ({"products": np.arange(75).astype(np.str_)}, "fewer than two products have two images"),
        ({"vectors": np.ones((75, 4), np.float32)}, "expected more than 64 images and dimensions"),
    ],
)
def test_images_that_cannot_be_measured_are_rejected(images: Images, changes: dict, message: str) -> None:
    count = len(images.vectors)
    changes = {name: values[:count] for name, values in changes.items()}
    with pytest.raises(UserError, match=message):
        measure_statistics(replace(images.select(np.arange(count) < 75), **changes))
