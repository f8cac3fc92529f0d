"""``vpr gallery search``: nearest images of embedded queries in one version of a gallery."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vpr.artifacts.run_folder import atomic_write
from vpr.common.errors import printable
from vpr.common.log import get_logger
from vpr.gallery.config import GallerySearchConfig
from vpr.gallery.gallery import CALIBRATE, IDS, Gallery, load_gallery
from vpr.gallery.nearest import find_best, find_nearest, usable_probes
from vpr.gallery.store import Snapshot, Vectors
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.search_command import NO_MATCH
from vpr.retrieval.threshold_command import StoredThreshold, load_threshold
from vpr.retrieval.threshold_scope import check_filter

log = get_logger(__name__)

_MAX_PRINTED = 8  # queries


@dataclass(frozen=True)
class Answer:
    """Images found for a query.

    Attributes:
        hits: Ids, score and metadata of each image, best first; empty for "no match".
        best: Highest score, also for "no match"; None if no image fulfils the condition.
        probability: Probability that the best image is of the query's product; None without a threshold.
    """

    hits: list[dict[str, Any]]
    best: float | None
    probability: float | None = None


def search_in_gallery(config: GallerySearchConfig) -> Path | None:
    """Search, print the first queries, and write all results as CSV with the metadata of the images.

    Raises:
        UserError: The queries or the threshold are of another model, or the condition or the version is invalid.
    """
    gallery = load_gallery(config.gallery)
    queries = load_embeddings(config.queries)
    version, answers, has_threshold = answer(gallery, queries, config)
    names = queries.images[queries.rows_with_role("query")].tolist()
    _print(names, answers)
    missed = sum(not found.hits for found in answers)
    log.info(f"version {version}: {len(names)} queries, {missed} without a match")
    if not config.output:
        return None
    _write(Path(config.output), names, answers, list(gallery.columns), has_threshold)
    return Path(config.output)


def answer(gallery: Gallery, queries: Embeddings, config: GallerySearchConfig) -> tuple[int, list[Answer], bool]:
    """Return the version that was searched, the answer of each query, and whether a threshold was applied.

    Raises:
        UserError: The queries or the threshold are of another model than the version, or the condition is invalid.
    """
    vectors = queries.vectors[queries.rows_with_role("query")]

    def search(snapshot: Snapshot) -> tuple[int, list[Answer], bool]:
        gallery.check_model(queries, "queries", snapshot)
        threshold = _find_threshold(gallery, snapshot, config.threshold)
        answers = _answer(snapshot, gallery, vectors, config, threshold)
        gallery.check_size(snapshot, threshold)
        if threshold and config.where:
            check_filter(threshold)
        return snapshot.version, answers, threshold is not None

    return search(gallery.snapshot(config.version)) if config.version else gallery.search_newest(search)


def _find_threshold(gallery: Gallery, snapshot: Snapshot, path: str) -> StoredThreshold | None:
    """Return the threshold of a file, or the stored one; none, with a warning, if that is of an earlier model."""
    if path:
        model = gallery.model_of(snapshot)
        return load_threshold(path, model.model, model.dim)
    if gallery.is_threshold_outgrown(snapshot):
        log.warning(f"threshold: the stored one is of an earlier model, so all queries are answered. {CALIBRATE}.")
    return gallery.threshold(snapshot)


def _answer(
    snapshot: Snapshot,
    gallery: Gallery,
    queries: Vectors,
    config: GallerySearchConfig,
    threshold: StoredThreshold | None,
) -> list[Answer]:
    k, probes = min(config.k, max(len(snapshot), 1)), usable_probes(snapshot, config.probes)
    nearest = find_nearest(snapshot, queries, k, config.where, probes)
    accepted, probabilities = np.ones(len(queries), dtype=bool), None
    if threshold:
        best = find_best(snapshot, queries, config.where, probes)
        accepted = threshold.accepts(best)
        probabilities = threshold.probability.predict(best)
    found = nearest.found
    columns = [*IDS, *gallery.columns]
    values = iter(snapshot.take(nearest.rows[found & accepted[:, None]], columns).to_pylist())
    answers = []
    for row, scores in enumerate(nearest.scores):
        count = int(found[row].sum())
        hits = [{**next(values), "score": float(score)} for score in scores[:count]] if accepted[row] else []
        probability = None if probabilities is None or not count else float(probabilities[row])
        answers.append(Answer(hits, float(scores[0]) if count else None, probability))
    return answers


def _write(path: Path, names: list[str], answers: list[Answer], columns: list[str], has_threshold: bool) -> None:
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream)
        last = ["probability"] if has_threshold else []
        writer.writerow(["query", "rank", "image", "product", "score", *last, *columns])
        for name, found in zip(names, answers, strict=True):
            shown = [_text(found.probability)] if has_threshold else []
            if not found.hits:
                writer.writerow([name, 0, "", "", _text(found.best), *shown, *[""] * len(columns)])
            for rank, hit in enumerate(found.hits, 1):
                ids = [name, rank, hit["image"], hit["product"], _text(hit["score"])]
                writer.writerow([*ids, *shown, *("" if hit[key] is None else hit[key] for key in columns)])


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _print(names: list[str], answers: list[Answer]) -> None:
    """Print a table of the first queries; control characters and markup in names are neutralised."""
    width = max((len(found.hits) for found in answers[:_MAX_PRINTED]), default=0) or 1
    table = Table("query", *[f"top {column + 1}" for column in range(width)])
    for name, found in zip(names[:_MAX_PRINTED], answers, strict=False):
        best = "no image" if found.best is None else f"best {found.best:.2f}"
        cells = [escape(printable(f"{hit['product']} {hit['score']:.2f}")) for hit in found.hits]
        table.add_row(escape(printable(name)), *(cells or [f"{NO_MATCH} ({best})"]))
    Console().print(table)
