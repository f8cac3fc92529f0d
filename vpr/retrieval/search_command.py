"""``vpr search``: nearest gallery images of queries, from two embeddings artifacts."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vpr.artifacts.run_folder import atomic_save_npy, atomic_write
from vpr.common.errors import UserError, printable
from vpr.common.log import get_logger
from vpr.retrieval.config import SearchConfig
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.rerank import rank

Strings = NDArray[np.str_]
Rows = NDArray[np.int64]
Scores = NDArray[np.float32]
log = get_logger(__name__)

SUBMITTED = 1000  # results per query in an AIcrowd submission
_MAX_PRINTED = 8  # queries


def search_gallery(config: SearchConfig) -> Path | None:
    """Search, print the first queries, and write all results as CSV (query, rank, image, product, score).

    Raises:
        UserError: The embeddings are from two models, or the gallery is too small for ``k`` or a submission.
    """
    queries, gallery = load_embeddings(config.queries), load_embeddings(config.gallery)
    _check_comparable(config, queries, gallery)
    query_rows, gallery_rows = queries.rows_with_role("query"), gallery.rows_with_role("gallery")
    if config.submission:
        _check_complete(queries, gallery, len(gallery_rows))
    k = max(config.k, SUBMITTED) if config.submission else config.k
    scores, ranking = rank(queries.vectors[query_rows], gallery.vectors[gallery_rows], config.rerank, k)
    hits = gallery_rows[ranking[:, : config.k]]
    _print(queries.products[query_rows], gallery, hits[:_MAX_PRINTED], scores)
    if config.submission:
        atomic_save_npy(Path(config.submission), ranking[:, :SUBMITTED].astype(np.int64))
        log.info(f"{config.submission}: {len(query_rows)} queries, {SUBMITTED} of {len(gallery_rows)} gallery images")
    if not config.output:
        return None
    _write(Path(config.output), queries.images[query_rows], gallery, hits, scores)
    log.info(f"{config.output}: {len(query_rows)} queries, {config.k} results each")
    return Path(config.output)


def _check_comparable(config: SearchConfig, queries: Embeddings, gallery: Embeddings) -> None:
    """Raise :class:`UserError` if queries and gallery are not from the same model."""
    query_model, gallery_model = queries.model, gallery.model
    if query_model.sha256 != gallery_model.sha256:
        models = f"embedded with '{query_model.name}', the gallery with '{gallery_model.name}'"
        raise UserError(f"{config.queries}: {models}. Embed both with one model.")
    dim, gallery_dim = queries.vectors.shape[1], gallery.vectors.shape[1]
    if dim != gallery_dim:
        raise UserError(f"{config.queries}: {dim} dimensions, the gallery has {gallery_dim}. Embed both again.")


def _check_complete(queries: Embeddings, gallery: Embeddings, gallery_size: int) -> None:
    """Raise :class:`UserError` if a submission would have too few images or shifted indices."""
    if gallery_size < SUBMITTED:
        expected = f"expected a gallery of {SUBMITTED} images or more"
        raise UserError(f"submission: {expected}, got {gallery_size}. Use --output instead.")
    for embeddings in (queries, gallery):
        if embeddings.artifact.card.metrics.get("set_aside"):
            problem = f"{embeddings.artifact.path} lacks images that could not be read"
            raise UserError(f"submission: {problem}. Repair those in its catalogue's set_aside.csv and embed again.")


def _write(path: Path, query_images: Strings, gallery: Embeddings, hits: Rows, scores: Scores) -> None:
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream)
        writer.writerow(["query", "rank", "image", "product", "score"])
        for row, query_image in enumerate(query_images):
            for column, hit in enumerate(hits[row]):
                values = [query_image, column + 1, gallery.images[hit], gallery.products[hit]]
                writer.writerow([*values, f"{scores[row, column]:.6f}"])


def _print(query_products: Strings, gallery: Embeddings, hits: Rows, scores: Scores) -> None:
    """Print a table of the first queries; control characters and markup in names are neutralised."""
    table = Table("query", *[f"top {column + 1}" for column in range(hits.shape[1])])
    for row, hit_rows in enumerate(hits):
        pairs = zip(hit_rows, scores[row], strict=False)
        cells = [escape(printable(f"{gallery.products[hit]} {score:.2f}")) for hit, score in pairs]
        table.add_row(escape(printable(query_products[row])), *cells)
    Console().print(table)
