"""Search by the bytes of an image: nearest gallery rows, and the time of each step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from export.backends.registry import BackendUnavailable, Model, default_threads, models_of
from vpr.artifacts.store import reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA, Catalog, load_catalog
from vpr.imaging.decode import decode_bytes
from vpr.imaging.preprocess import ModelInput, Preprocess
from vpr.inference.timing import measure
from vpr.retrieval.embeddings import Forward, embed, l2_normalize, load_embeddings, write_embeddings
from vpr.retrieval.open_set import find_best_products
from vpr.retrieval.search import search
from vpr.retrieval.threshold_command import StoredThreshold, load_threshold

log = get_logger(__name__)

_BACKEND_SECONDS = 0.2  # timing of each backend, if an artifact has several


@dataclass(frozen=True)
class SearchResult:
    """Gallery images that one model found."""

    rows: NDArray[np.int64]  # (top,) int64, rows of the gallery, nearest first
    scores: NDArray[np.float32]  # (top,) float32, cosines of these rows
    milliseconds: dict[str, float]  # milliseconds of each step, by name
    is_match: bool = True  # whether the best image reaches the threshold
    probability: float | None = None  # probability that its product is right; None without a threshold


@dataclass(frozen=True)
class Searcher:
    """A model and the gallery that it embedded."""

    name: str  # names of the artifact and the backend
    preprocess: Preprocess  # preprocessing of the model's card
    forward: Forward  # function that runs the model
    vectors: NDArray[np.float32]  # (gallery, dim) float32, L2-normalised
    sha256: str  # checksum of the card of the artifact
    products: NDArray[np.str_]  # (gallery,) product ids
    threshold: StoredThreshold | None = None  # None answers every image

    def search_bytes(self, data: bytes, top: int) -> SearchResult:
        """Return the ``top`` images nearest to that of a file's bytes; :class:`ImageRejected` if they are none."""
        start = time.perf_counter()
        batch = self._read(data)
        decoded = time.perf_counter()
        query = l2_normalize(self.forward(batch))
        embedded = time.perf_counter()
        scores, rows = search(query, self.vectors, top)
        times = (start, decoded, embedded, time.perf_counter())
        steps = ("decode + preprocess", "embed", "search")
        milliseconds = dict(zip(steps, 1000 * np.diff(times), strict=True))
        if self.threshold is None:
            return SearchResult(rows[0], scores[0], milliseconds)
        best = find_best_products(query, self.vectors, self.products)
        probability = float(self.threshold.probability.predict(best)[0])
        return SearchResult(rows[0], scores[0], milliseconds, bool(self.threshold.accepts(best)[0]), probability)

    def embed_bytes(self, data: bytes) -> NDArray[np.float32]:
        """Return the (dim,) float32 L2-normalised embedding of a file's bytes; :class:`ImageRejected` if no image."""
        return l2_normalize(self.forward(self._read(data)))[0]

    def _read(self, data: bytes) -> ModelInput:
        image = decode_bytes(data, "upload", shortest=self.preprocess.size)
        return self.preprocess.model_input(self.preprocess.pixels(image)[None])


def load_searchers(
    models: tuple[str, ...], catalog: str, split: str, embeddings: tuple[str, ...], thresholds: tuple[str, ...] = ()
) -> tuple[list[Searcher], Catalog]:
    """Load each model on its fastest backend here, and the gallery of a split that all of them search.

    The embeddings artifact of each model is written if it does not exist; without ``embeddings`` the gallery is
    embedded in memory. ``thresholds`` are artifacts of ``vpr gallery threshold``, one for each model, or none.
    :class:`UserError` if there is no gallery, a model cannot run here, embeddings are of another model or gallery, or a
    threshold is of another model.
    """
    images = load_catalog(catalog).select(split=split or None)
    gallery = images.select(role="gallery")
    if not len(gallery):
        raise UserError(f"{catalog}: split '{split or 'any'}' has no gallery images. Choose another --split.")
    searchers = []
    for index, path in enumerate(models):
        model, forward = _open_fastest(path)
        preprocess = model.preprocess
        card = model.artifact.card
        if thresholds and card.embedding is None:
            raise UserError(f"{path}: the card has no embedding. Create the artifact again.")
        threshold = (
            load_threshold(thresholds[index], model.artifact.as_parent("model"), card.embedding.dim)
            if thresholds and card.embedding
            else None
        )
        if embeddings:
            vectors = _stored_vectors(embeddings[index], model, forward, images, split)
        else:
            with _with_progress(forward, model.name, len(gallery)) as forward_counted:
                vectors = embed(gallery, preprocess, forward_counted)
        log.info(f"  {model.name:<32} {len(vectors)} gallery images  {vectors.shape[1]} dimensions")
        sha256 = model.artifact.sha256
        searchers.append(Searcher(model.name, preprocess, forward, vectors, sha256, gallery.products, threshold))
    return searchers, gallery


def describe_agreement(results: list[SearchResult]) -> str:
    """Return a sentence on the agreement of two lists; empty for one list."""
    if len(results) == 1:
        return ""
    first, second = (result.rows for result in results)
    same = "Same first image" if first[0] == second[0] else "Different first images"
    return f"{same}; {len(np.intersect1d(first, second))} of {len(first)} are in both lists."


def _open_fastest(path: str) -> tuple[Model, Forward]:
    opened: dict[str, tuple[Model, Forward]] = {}
    reasons = []
    for model in models_of(path):
        try:
            opened[model.name] = (model, model.open(default_threads()))
        except BackendUnavailable as reason:
            reasons.append(f"{model.name}: {reason}")
    if not opened:
        raise UserError(f"{path}: no backend can run this artifact here ({'; '.join(reasons)}). Run `vpr doctor`.")
    if len(opened) == 1:
        return next(iter(opened.values()))
    image = next(iter(opened.values()))[0].random_input(1)
    calls = {name: (lambda forward=forward: forward(image)) for name, (_, forward) in opened.items()}
    times = {name: float(np.median(values)) for name, values in measure(calls, _BACKEND_SECONDS).items()}
    return opened[min(times, key=lambda name: times[name])]


def _stored_vectors(path: str, model: Model, forward: Forward, images: Catalog, split: str) -> NDArray[np.float32]:
    """Return the gallery's vectors of an embeddings artifact; write it if it does not exist, never replace it."""
    if not Path(path).exists():
        with _with_progress(forward, model.name, len(images)) as forward_counted:
            vectors = embed(images, model.preprocess, forward_counted)
        write_embeddings(path, vectors, images, model.artifact, {"split": split, "backend": model.backend})
    stored = load_embeddings(path)
    if model.artifact.as_parent("model") not in stored.artifact.card.parents:
        raise UserError(f"{path}: these embeddings are not of {model.artifact.path}. Pass this model's, or a new path.")
    expected = model.artifact.card.embedding
    if expected is not None and stored.vectors.shape[1] != expected.dim:
        problem = f"{stored.vectors.shape[1]} dimensions, {model.artifact.path} gives {expected.dim}"
        raise UserError(f"{path}: {problem}. Embed it without --dimensions, or export a graph with them.")
    with reraise_as_artifact_error(stored.artifact):
        rows = pq.read_table(stored.artifact.file("rows.parquet")).cast(SCHEMA)
    in_gallery = stored.roles == "gallery"
    if split:
        in_gallery &= np.array(rows["split"].to_pylist(), dtype=np.str_) == split
    if not rows.filter(in_gallery).equals(images.select(role="gallery").table):
        raise UserError(f"{path}: these embeddings are of another gallery. Embed it again, or pass a new path.")
    return stored.vectors[in_gallery]


@contextmanager
def _with_progress(forward: Forward, name: str, total: int) -> Iterator[Forward]:
    """Show a progress bar of the images that a function embeds."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"  {name}: embedding", total=total)

        def counted(batch: NDArray[np.float32]) -> NDArray[np.float32]:
            vectors = forward(batch)
            progress.advance(task, len(batch))
            return vectors

        yield counted
