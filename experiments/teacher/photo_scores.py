"""Scores of a model on the photographs of groceries: photographs among themselves, and against shop images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.figures import Row
from experiments.intervals import mean_text
from vpr.data.catalog import Catalog
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import Forward, embed, score_split
from vpr.retrieval.metrics import RetrievalScores, evaluate

_DRAWS = 100  # of one photograph of each product


@dataclass(frozen=True)
class PhotoScores:
    """Scores of one model on the same queries, photographs of unseen products.

    Attributes:
        photos: Against all other photographs of the gallery.
        one: (queries,) share of draws with a correct first result, where a draw keeps one photograph of each product.
        shop: Against the shop images of all products, those of training too, one of each.
    """

    photos: RetrievalScores
    one: NDArray[np.float64]
    shop: RetrievalScores


def score_photos(test: Catalog, shop: Catalog, preprocess: Preprocess, forward: Forward) -> PhotoScores:
    """Embed and score the test photographs and the shop images."""
    vectors, of_shop = (embed(images, preprocess, forward) for images in (test, shop))
    is_query, products = test.roles == "query", test.products
    queries, of_queries = vectors[is_query], products[is_query]
    one = _score_one(queries, of_queries, vectors[~is_query], products[~is_query])
    return PhotoScores(score_split(test, vectors), one, evaluate(queries, of_queries, of_shop, shop.products))


def _score_one(
    queries: NDArray[np.float32], of_queries: NDArray[np.str_], gallery: NDArray[np.float32], products: NDArray[np.str_]
) -> NDArray[np.float64]:
    generator = np.random.default_rng(0)
    names, numbers = np.unique(products, return_inverse=True)
    rows_of = [np.flatnonzero(numbers == number) for number in range(len(names))]
    hits = np.zeros(len(queries))
    for _ in range(_DRAWS):
        drawn = [generator.choice(rows) for rows in rows_of]
        hits += names[(queries @ gallery[drawn].T).argmax(1)] == of_queries
    return hits / _DRAWS


def photo_row(name: str, seeds: list[PhotoScores]) -> Row:
    """Return the row of a model, averaged over seeds, with intervals by product."""
    products = seeds[0].photos.products
    columns: dict[str, list[Any]] = {
        "recall@1 [95 %]": [seed.photos.hits for seed in seeds],
        "mAP [95 %]": [seed.photos.precisions for seed in seeds],
        "recall@1, one photograph of each product [95 %]": [seed.one for seed in seeds],
        "recall@1, shop images [95 %]": [seed.shop.hits for seed in seeds],
    }
    return {"model": name} | {key: mean_text(np.mean(values, axis=0), products) for key, values in columns.items()}
