"""``vpr search``: nearest gallery images of queries, both embedded before."""

from __future__ import annotations

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

log = get_logger(__name__)

SUBMITTED = 1000  # results per query in an AIcrowd submission
_SHOWN = 8


def search_gallery(config: SearchConfig) -> Path | None:
    """Search, print the first queries, and write all results as CSV (query, rank, image, product, score).

    Raises:
        UserError: embeddings of two models, too small a gallery for ``k`` or a submission.
    """
    queries, gallery = load_embeddings(config.queries), load_embeddings(config.gallery)
    _check_comparable(config, queries, gallery)
    asked, shown = queries.rows_with_role("query"), gallery.rows_with_role("gallery")
    if config.submission:
        _check_complete(queries, gallery, len(shown))
    wanted = max(config.k, SUBMITTED) if config.submission else config.k
    scores, found = rank(queries.vectors[asked], gallery.vectors[shown], config.rerank, wanted)
    _print(queries, gallery, asked, shown[found[:_SHOWN, : config.k]], scores)
    if config.submission:
        atomic_save_npy(Path(config.submission), found[:, :SUBMITTED].astype(np.int64))
        log.info(f"{config.submission}: {len(asked)} queries, {SUBMITTED} of {len(shown)} gallery images each")
    if not config.output:
        return None
    _write(Path(config.output), queries, gallery, asked, shown[found[:, : config.k]], scores)
    log.info(f"{config.output}: {len(asked)} queries, {config.k} results each")
    return Path(config.output)


def _check_comparable(config: SearchConfig, queries: Embeddings, gallery: Embeddings) -> None:
    """Refuse embeddings of two models."""
    first, second = queries.model, gallery.model
    if first.sha256 != second.sha256:
        raise UserError(
            f"{config.queries}: embedded with '{first.name}', the gallery with '{second.name}': use one model"
        )
    if queries.vectors.shape[1] != gallery.vectors.shape[1]:
        raise UserError(
            f"{config.queries}: {queries.vectors.shape[1]} dimensions, the gallery has {gallery.vectors.shape[1]}: "
            "embed both again"
        )


def _check_complete(queries: Embeddings, gallery: Embeddings, shown: int) -> None:
    """Refuse a submission whose numbers would be those of other images, or too few."""
    if shown < SUBMITTED:
        raise UserError(
            f"submission: {SUBMITTED} different images are listed for each query, the gallery has {shown}: "
            "use --output instead"
        )
    for embeddings in (queries, gallery):
        if embeddings.artifact.card.metrics.get("set_aside"):
            raise UserError(
                f"submission: {embeddings.artifact.path} lacks images that could not be read (its catalogue's "
                "set_aside.csv): mend them and embed again"
            )


def _write(
    path: Path,
    queries: Embeddings,
    gallery: Embeddings,
    asked: NDArray[np.int64],
    hits: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> None:
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream)
        writer.writerow(["query", "rank", "image", "product", "score"])
        for row, query in enumerate(asked):
            for place, hit in enumerate(hits[row]):
                values = [queries.images[query], place + 1, gallery.images[hit], gallery.products[hit]]
                writer.writerow([*values, f"{scores[row, place]:.6f}"])


def _print(
    queries: Embeddings,
    gallery: Embeddings,
    asked: NDArray[np.int64],
    hits: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> None:
    table = Table("query", *[f"top {place + 1}" for place in range(hits.shape[1])])
    for row, found in enumerate(hits):
        names = [escape(printable(f"{gallery.products[i]} {s:.2f}")) for i, s in zip(found, scores[row], strict=False)]
        table.add_row(escape(printable(queries.products[asked[row]])), *names)
    Console().print(table)
