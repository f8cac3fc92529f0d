"""``vpr search``: nearest gallery images of queries, from two embeddings artifacts."""

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vpr.artifacts.names import tell_apart
from vpr.artifacts.run_folder import atomic_save_npy, atomic_write
from vpr.common.errors import UserError, printable
from vpr.common.log import get_logger
from vpr.retrieval.config import SearchConfig
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.open_set import BestProducts, find_best_products
from vpr.retrieval.rerank import rank
from vpr.retrieval.threshold_command import StoredThreshold, load_threshold
from vpr.retrieval.threshold_scope import check_gallery_size

Strings = NDArray[np.str_]
Rows = NDArray[np.int64]
Scores = NDArray[np.float32]
log = get_logger(__name__)

SUBMITTED = 1000  # results per query in an AIcrowd submission
_MAX_PRINTED = 8  # queries
NO_MATCH = "no match"


@dataclass(frozen=True)
class _Answers:
    """Results of all queries: (queries, k) gallery rows and scores; with a threshold, which queries have a match."""

    query_images: Strings
    query_products: Strings
    hits: Rows
    scores: Scores
    best: BestProducts | None = None  # best images of the queries; None without a threshold
    threshold: StoredThreshold | None = None

    @cached_property
    def accepted(self) -> NDArray[np.bool_]:
        """Whether each query has a match, (queries,) bool."""
        if self.threshold is None or self.best is None:
            return np.ones(len(self.hits), dtype=bool)
        return self.threshold.accepts(self.best)

    @cached_property
    def probabilities(self) -> NDArray[np.float64] | None:
        """Probability that the best image is of the query's product, (queries,) float64; None without a threshold."""
        return None if self.threshold is None or self.best is None else self.threshold.probability.predict(self.best)


def search_gallery(config: SearchConfig) -> Path | None:
    """Search, print the first queries, and write all results as CSV (query, rank, image, product, score).

    With a threshold, a query without a match has one line: rank 0, no image, no product, and its best score. A column
    has the probability that the best image is of the query's product.

    Raises:
        UserError: The embeddings are from two models, the threshold is of another one, or the gallery is too small for
            ``k`` or a submission.
    """
    queries, gallery = load_embeddings(config.queries), load_embeddings(config.gallery)
    _check_comparable(config, queries, gallery)
    dim = gallery.vectors.shape[1]
    threshold = load_threshold(config.threshold, gallery.model, dim) if config.threshold else None
    query_rows, gallery_rows = queries.rows_with_role("query"), gallery.gallery_rows()
    if config.submission:
        _check_complete(queries, gallery, len(gallery_rows))
    k = max(config.k, SUBMITTED) if config.submission else config.k
    vectors = queries.vectors[query_rows], gallery.vectors[gallery_rows]
    scores, ranking = rank(*vectors, config.rerank, k)
    best = None
    if threshold:
        check_gallery_size(threshold, len(np.unique(gallery.products[gallery_rows])))
        best = find_best_products(*vectors, gallery.products[gallery_rows])
    hits = gallery_rows[ranking[:, : config.k]]
    answers = _Answers(queries.images[query_rows], queries.products[query_rows], hits, scores, best, threshold)
    _print(answers, gallery)
    if threshold:
        log.info(f"{len(query_rows)} queries: {int((~answers.accepted).sum())} without a match")
    if config.submission:
        atomic_save_npy(Path(config.submission), ranking[:, :SUBMITTED].astype(np.int64))
        log.info(f"{config.submission}: {len(query_rows)} queries, {SUBMITTED} of {len(gallery_rows)} gallery images")
    if not config.output:
        return None
    _write(Path(config.output), answers, gallery)
    log.info(f"{config.output}: {len(query_rows)} queries, {config.k} results each")
    return Path(config.output)


def _check_comparable(config: SearchConfig, queries: Embeddings, gallery: Embeddings) -> None:
    """Raise :class:`UserError` if queries and gallery are not from the same model."""
    query_model, gallery_model = queries.model, gallery.model
    if query_model.sha256 != gallery_model.sha256:
        own, other = tell_apart(query_model, gallery_model)
        raise UserError(f"{config.queries}: embedded with {own}, the gallery with {other}. Embed both with one model.")
    dim, gallery_dim = queries.vectors.shape[1], gallery.vectors.shape[1]
    if dim != gallery_dim:
        problem = f"{dim} dimensions, the gallery has {gallery_dim}"
        raise UserError(f"{config.queries}: {problem}. Embed both with the same --dimensions.")


def _check_complete(queries: Embeddings, gallery: Embeddings, gallery_size: int) -> None:
    """Raise :class:`UserError` if a submission would have too few images or shifted indices."""
    if gallery_size < SUBMITTED:
        expected = f"expected a gallery of {SUBMITTED} images or more"
        raise UserError(f"submission: {expected}, got {gallery_size}. Use --output instead.")
    for embeddings in (queries, gallery):
        if embeddings.artifact.card.metrics.get("set_aside"):
            problem = f"{embeddings.artifact.path} lacks images that could not be read"
            raise UserError(f"submission: {problem}. Repair those in its catalogue's set_aside.csv and embed again.")


def _write(path: Path, answers: _Answers, gallery: Embeddings) -> None:
    probabilities = answers.probabilities
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream)
        writer.writerow(["query", "rank", "image", "product", "score", *(["probability"] if answers.threshold else [])])
        for row, query_image in enumerate(answers.query_images):
            last = [] if probabilities is None else [f"{probabilities[row]:.6f}"]
            if not answers.accepted[row]:
                writer.writerow([query_image, 0, "", "", f"{answers.scores[row, 0]:.6f}", *last])
                continue
            for column, hit in enumerate(answers.hits[row]):
                values = [query_image, column + 1, gallery.images[hit], gallery.products[hit]]
                writer.writerow([*values, f"{answers.scores[row, column]:.6f}", *last])


def _print(answers: _Answers, gallery: Embeddings) -> None:
    """Print a table of the first queries; control characters and markup in names are neutralised."""
    table = Table("query", *[f"top {column + 1}" for column in range(answers.hits.shape[1])])
    for row, hit_rows in enumerate(answers.hits[:_MAX_PRINTED]):
        scores = answers.scores[row]
        pairs = zip(hit_rows, scores, strict=False)
        cells = [escape(printable(f"{gallery.products[hit]} {score:.2f}")) for hit, score in pairs]
        if not answers.accepted[row]:
            cells = [f"{NO_MATCH} (best {scores[0]:.2f})"]
        table.add_row(escape(printable(answers.query_products[row])), *cells)
    Console().print(table)
