"""Statistics of embeddings that decide how hard a gallery is to store: spectrum, shares of variance, margins.

``python -m experiments.gallery.embedding_statistics --embeddings PATH`` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from experiments.command import run_command
from experiments.figures import Row, markdown
from vpr.common.errors import UserError
from vpr.retrieval.embeddings import load_embeddings

Vectors = NDArray[np.float32]
Numbers = NDArray[np.float64]
Labels = NDArray[np.str_]
Quantiles = tuple[float, float, float]
_RANKS = (8, 64)  # of the eigenvalues that the decay is fitted to
_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Images:
    """Embedded images with labels, (n, ...) each.

    Attributes:
        vectors: (n, dim) float32, L2-normalised.
        products: Product ids.
        categories: Categories of the products.
        is_query: Whether an image is a query. If none is, every image searches all others.
    """

    vectors: Vectors
    products: Labels
    categories: Labels
    is_query: NDArray[np.bool_]

    def select(self, rows: NDArray[np.bool_]) -> Images:
        """Select rows."""
        return Images(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class EmbeddingStatistics:
    """Statistics of embedded images.

    The shares add up to 1 for images of one role: ``common + category + product + noise``. They are differences of mean
    cosines, which are unbiased and are variance components where the vectors have length 1.

    Attributes:
        products: Number of products.
        decay: Power with which the eigenvalues of the covariance fall from rank 8 to 64.
        effective_dims: (sum of the eigenvalues)^2 over the sum of their squares, the participation ratio.
        common: Mean cosine of images of different categories.
        category: Mean cosine of images of different products of a category, less ``common``.
        product: Mean cosine of gallery images of a product, less the two before.
        gallery_noise: 1 less the mean cosine of two gallery images of a product.
        query_noise: 1 less the mean cosine of two queries of a product.
        noise_spread: Standard deviation over products of the logarithm of their noise.
        recall_at_1: Share of queries that find their product.
        margin: 10, 50 and 90 % quantiles of the largest cosine to the query's product less that to another product.
        nearest_other: 10, 50 and 90 % quantiles of the largest cosine to another product.
    """

    products: int
    decay: float
    effective_dims: float
    common: float
    category: float
    product: float
    gallery_noise: float
    query_noise: float
    noise_spread: float
    recall_at_1: float
    margin: Quantiles
    nearest_other: Quantiles


def measure_statistics(images: Images) -> EmbeddingStatistics:
    """Measure embedded images.

    Raises:
        UserError: A product has one image of a role only, there are fewer than two products in a category or fewer than
            two categories, or there are too few dimensions or images for the fitted ranks.
    """
    is_gallery = ~images.is_query
    has_queries = bool(images.is_query.any())
    common, between = _mean_cosines(images)
    gallery = _cosines_within(images.select(is_gallery))
    query = _cosines_within(images.select(images.is_query)) if has_queries else gallery
    decay, effective = _spectrum(images.vectors)
    own, other = _best_cosines(images)
    return EmbeddingStatistics(
        products=len(np.unique(images.products)),
        decay=decay,
        effective_dims=effective,
        common=common,
        category=between - common,
        product=float(gallery.mean()) - between,
        gallery_noise=1 - float(gallery.mean()),
        query_noise=1 - float(query.mean()),
        noise_spread=float(np.log(np.maximum(1 - query, 1e-9)).std()),
        recall_at_1=float((own > other).mean()),
        margin=_quantiles(own - other),
        nearest_other=_quantiles(other),
    )


def _cosines_within(images: Images) -> Numbers:
    """Return the mean cosine of two different images of each product with two or more, (products,) float64."""
    codes = np.unique(images.products, return_inverse=True)[1]
    sums, sizes = _sums(images.vectors.astype(np.float64), codes)
    several = sizes > 1
    if several.sum() < 2:
        raise UserError("embeddings: fewer than two products have two images of a role. Embed more images.")
    sums, sizes = sums[several], sizes[several]
    return ((sums**2).sum(axis=1) - sizes) / (sizes * (sizes - 1))


def _mean_cosines(images: Images) -> tuple[float, float]:
    """Return the mean cosine of images of different categories, and of different products of a category.

    Every product has the same weight, whatever its number of images.
    """
    _, first, codes = np.unique(images.products, return_index=True, return_inverse=True)
    sums, sizes = _sums(images.vectors.astype(np.float64), codes)
    means = sums / sizes[:, None]
    groups = np.unique(images.categories[first], return_inverse=True)[1]
    totals, counts = _sums(means, groups)
    pairs, all_pairs = (counts * (counts - 1)).sum(), len(means) ** 2 - (counts**2).sum()
    if not pairs or not all_pairs:
        raise UserError("embeddings: expected two categories, and two products in one of them. Embed more products.")
    inner = ((totals**2).sum() - (means**2).sum()) / pairs
    outer = ((totals.sum(axis=0) ** 2).sum() - (totals**2).sum()) / all_pairs
    return float(outer), float(inner)


def _sums(values: Numbers, codes: NDArray[np.int64]) -> tuple[Numbers, Numbers]:
    """Return the sums of (n, d) rows by code, (codes, d), and the numbers of rows, (codes,)."""
    sums = np.zeros((codes.max() + 1, values.shape[1]))
    np.add.at(sums, codes, values)
    return sums, np.bincount(codes).astype(np.float64)


def _spectrum(vectors: Vectors) -> tuple[float, float]:
    """Return the decay of the eigenvalues about the mean, and the participation ratio."""
    first, last = _RANKS
    if min(vectors.shape) <= last:
        raise UserError(f"embeddings: expected more than {last} images and dimensions, got {vectors.shape}.")
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    ranks = np.unique(np.geomspace(first, last, 30).round().astype(int))
    slope = np.polyfit(np.log(ranks), np.log(np.maximum(values[ranks - 1], 1e-30)), 1)[0]
    return -float(slope), float(values.sum() ** 2 / (values**2).sum())


def _best_cosines(images: Images) -> tuple[Numbers, Numbers]:
    """Return the largest cosines of each query to its product and to another one, without the query itself."""
    rows = np.flatnonzero(images.is_query) if images.is_query.any() else np.arange(len(images.vectors))
    columns = np.flatnonzero(~images.is_query)
    codes = np.unique(images.products, return_inverse=True)[1]
    own, other = np.empty(len(rows)), np.empty(len(rows))
    gallery = images.vectors[columns].T
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        cosines = images.vectors[part] @ gallery
        cosines[part[:, None] == columns] = -np.inf
        is_own = codes[part][:, None] == codes[columns]
        own[start : start + 1000] = np.where(is_own, cosines, -np.inf).max(axis=1)
        other[start : start + 1000] = np.where(is_own, -np.inf, cosines).max(axis=1)
    used = np.isfinite(own)  # a query without another image of its product has nothing to find
    return own[used], other[used]


def _quantiles(values: Numbers) -> Quantiles:
    low, middle, high = np.quantile(values, _QUANTILES)
    return float(low), float(middle), float(high)


def statistics_row(name: str, statistics: EmbeddingStatistics) -> Row:
    """Return a row of the table of embeddings."""
    row: Row = {"embeddings": name, "products": f"{statistics.products:,}"}
    for field in fields(statistics)[1:]:
        value = getattr(statistics, field.name)
        text = " / ".join(f"{one:.2f}" for one in value) if isinstance(value, tuple) else f"{value:.2f}"
        row[field.name.replace("_", " ").replace("at 1", "@1").replace(" @", "@")] = text
    return row


def read_images(path: str, split: str) -> Images:
    """Read the images of a split from an embeddings artifact; an empty split takes all.

    Raises:
        UserError: There are no such images.
    """
    embeddings = load_embeddings(path)
    table = pq.read_table(embeddings.artifact.file("rows.parquet"), columns=["split", "category"]).to_pydict()
    splits, categories = (np.array([value or "" for value in table[name]]) for name in ("split", "category"))
    images = Images(embeddings.vectors, embeddings.products, categories, embeddings.roles == "query")
    images = images.select((splits == split) if split else np.ones(len(splits), bool))
    if not len(images.vectors):
        raise UserError(f"split: {path} has no images of split '{split}'. Choose another one.")
    return images


@dataclass(frozen=True)
class StatisticsConfig:
    """Settings of the measurement.

    Attributes:
        embeddings: Embeddings artifacts of catalogues with categories.
        split: Split to measure; empty measures all images.
    """

    embeddings: tuple[str, ...]
    split: str = "test"


def _print(config: StatisticsConfig) -> None:
    rows = [statistics_row(path, measure_statistics(read_images(path, config.split))) for path in config.embeddings]
    print(markdown(rows))


if __name__ == "__main__":
    run_command("experiments.gallery.embedding_statistics", __doc__, StatisticsConfig, _print)
