"""Fit of an adapter on training products, its choice on validation products, and recall on test products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpr.artifacts.store import reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog
from vpr.gallery.order import ORDERS, OrderName, Rows, order_rows
from vpr.retrieval.adapter import Adapter, Method, Vectors, fit_linear, fit_procrustes
from vpr.retrieval.embeddings import Embeddings
from vpr.retrieval.intervals import Ids, Interval, mean_interval, ratio_interval
from vpr.retrieval.metrics import RetrievalScores, evaluate
from vpr.retrieval.self_search import find_self_search

STEPS = 10
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_DRAWS = 5  # random orders, averaged
Hits = NDArray[np.float64]


@dataclass(frozen=True)
class SplitVectors:
    """Vectors of a split by the old and the new model.

    Attributes:
        old_queries: (queries, old) float32 of the old model.
        queries: (queries, new) float32 of the new model.
        query_products: (queries,) product ids.
        old: (images, old) float32 of the gallery images.
        new: (images, new) float32 of the gallery images.
        products: (images,) product ids.
        images: (images,) image ids.
        own: (queries,) row of each query's own image if the split searches itself, else None.
    """

    old_queries: Vectors
    queries: Vectors
    query_products: Ids
    old: Vectors
    new: Vectors
    products: Ids
    images: Ids
    own: Rows | None

    def score(self, gallery: Vectors) -> RetrievalScores:
        """Score the new model's queries in (images, new) vectors of the gallery."""
        return evaluate(self.queries, self.query_products, gallery, self.products, own=self.own)

    def score_old(self) -> RetrievalScores:
        """Score the old model's queries in its own gallery."""
        return evaluate(self.old_queries, self.query_products, self.old, self.products, own=self.own)

    def count_products(self) -> int:
        """Return the number of products of the images."""
        return len(np.unique(self.products))


@dataclass(frozen=True)
class Fit:
    """Fitted adapters, and the one that validation products chose.

    Attributes:
        procrustes: Orthogonal map.
        linear: Affine map, of the penalty that is best on validation products.
        method: The better one of the two on validation products.
        candidates: Results of all on validation products, as JSON.
    """

    procrustes: Adapter
    linear: Adapter
    method: Method
    candidates: list[dict[str, Any]]

    @property
    def chosen(self) -> Adapter:
        """The better adapter."""
        return self.procrustes if self.method == "procrustes" else self.linear


@dataclass(frozen=True)
class Curve:
    """Recall with a share of the gallery embedded again.

    Attributes:
        share: Share of the images with vectors of the new model; the others have the adapter's.
        recall: Recall@1 of the new model's queries.
        interval: 95 % interval of it by product; None with too few products.
        ratio: Recall over that of the new model's own gallery.
        ratio_interval: 95 % interval of it by product.
        random: Recall@1 if the images are embedded in random order, the mean of several orders.
        random_interval: 95 % interval of it by product.
    """

    share: float
    recall: float
    interval: Interval | None
    ratio: float
    ratio_interval: Interval | None
    random: float
    random_interval: Interval | None


def read_split(old: Embeddings, new: Embeddings, split: str) -> SplitVectors:
    """Return the vectors of a split; in the training split, all images are gallery images.

    Raises:
        UserError: The embeddings differ in their images, or have no images of the split.
    """
    table, other = (_rows_of(embeddings) for embeddings in (old, new))
    keys = ["image", "product", "role", "split"]
    if not table.select(keys).equals(other.select(keys)):
        raise UserError(f"new: {new.artifact.path} has other images than {old.artifact.path}. Embed one catalogue.")
    rows = np.flatnonzero(np.array(table["split"].to_pylist(), dtype=np.str_) == split)
    if not len(rows):
        raise UserError(
            f"old: {old.artifact.path} has no images of split '{split}'. Embed the catalogue without --split."
        )
    part = Catalog(table.take(rows), Path())
    own = None
    queries, gallery = (np.flatnonzero(part.roles == role) for role in ("query", "gallery"))
    if split == "train":
        queries, gallery = np.empty(0, np.int64), np.arange(len(rows))
    elif (found := find_self_search(part)) is not None:
        queries, gallery, own = found.queries, found.gallery, found.own
    searching, searched = rows[queries], rows[gallery]
    return SplitVectors(
        old.vectors[searching],
        new.vectors[searching],
        part.products[queries],
        old.vectors[searched],
        new.vectors[searched],
        part.products[gallery],
        old.images[searched],
        own,
    )


def _rows_of(embeddings: Embeddings) -> Any:
    with reraise_as_artifact_error(embeddings.artifact):
        return pq.read_table(embeddings.artifact.file("rows.parquet")).cast(SCHEMA)


def fit_adapter(train: SplitVectors, validation: SplitVectors) -> Fit:
    """Fit an orthogonal and affine maps on training images, and choose by recall@1, then mAP, of validation queries."""
    fitted: list[tuple[Method, float | None, Adapter]] = [("procrustes", None, fit_procrustes(train.old, train.new))]
    fitted += [("linear", ridge, fit_linear(train.old, train.new, ridge)) for ridge in _RIDGES]
    candidates, keys = [], []
    for method, ridge, adapter in fitted:
        vectors = adapter.apply(validation.old)
        scores = validation.score(vectors)
        cosine = float(np.einsum("nd,nd->n", vectors, validation.new).mean())
        keys.append((scores.recall_at_1, scores.map))
        candidates.append(
            {"method": method, "ridge": ridge, "recall": keys[-1][0], "map": keys[-1][1], "cosine": cosine}
        )
    best = max(range(len(keys)), key=keys.__getitem__)
    best_linear = max(range(1, len(keys)), key=keys.__getitem__)
    for number, row in enumerate(candidates):
        row["is_chosen"] = number == best
    return Fit(fitted[0][2], fitted[best_linear][2], fitted[best][0], candidates)


def choose_order(validation: SplitVectors, fit: Fit, seed: int) -> tuple[OrderName, dict[str, dict[str, Any]]]:
    """Return the order to embed in, and the recall@1 of validation queries on the way, the mean of all steps, of each.

    It is ``random``, the simple one, unless the 95 % interval by product of another order's gain is above 0.
    """
    products, drawn = validation.query_products, _hits(validation, fit, "random", seed)[1:-1].mean(axis=0)
    results: dict[str, dict[str, Any]] = {"random": {"recall": float(drawn.mean()), "gain": None}}
    best: OrderName = "random"
    for name in ORDERS[1:]:
        hits = _hits(validation, fit, name, seed)[1:-1].mean(axis=0)
        gain = mean_interval(hits - drawn, products, seed=seed, lowest=-1.0)
        results[name] = {"recall": float(hits.mean()), "gain": gain}
        if gain is not None and gain[0] > 0 and results[name]["recall"] > results[best]["recall"]:
            best = name
    return best, results


def measure(test: SplitVectors, fit: Fit, order: OrderName, seed: int) -> list[Curve]:
    """Return recall@1 of test queries at 0, 10, ..., 100 % of the gallery images embedded again."""
    products, own = test.query_products, test.score(test.new).hits.astype(np.float64)
    chosen, random = _hits(test, fit, order, seed), _hits(test, fit, "random", seed)
    curve = []
    for step, (hits, drawn) in enumerate(zip(chosen, random, strict=True)):
        curve.append(
            Curve(
                share=step / STEPS,
                recall=float(hits.mean()),
                interval=mean_interval(hits, products, seed=seed),
                ratio=float(hits.mean() / own.mean()) if own.any() else 0.0,
                ratio_interval=ratio_interval(hits, own, products, seed=seed),
                random=float(drawn.mean()),
                random_interval=mean_interval(drawn, products, seed=seed),
            )
        )
    return curve


def _hits(part: SplitVectors, fit: Fit, order: OrderName, seed: int) -> Hits:
    """Return (steps, queries) hits at rank 1; those of several random orders are averaged."""
    adapted, lengths = fit.chosen.apply(part.old), fit.linear.lengths(part.old)
    ids: tuple[Sequence[str], Sequence[str]] = (part.products.tolist(), part.images.tolist())
    seeds = range(seed, seed + _DRAWS) if order == "random" else (seed,)
    drawn = []
    for one in seeds:
        rows = order_rows(order, *ids, lengths, one)
        drawn.append([_step_hits(part, adapted, rows[: round(step / STEPS * len(rows))]) for step in range(STEPS + 1)])
    return np.mean(drawn, axis=0)


def _step_hits(part: SplitVectors, adapted: Vectors, embedded: Rows) -> Hits:
    vectors = adapted.copy()
    vectors[embedded] = part.new[embedded]
    return part.score(vectors).hits.astype(np.float64)
