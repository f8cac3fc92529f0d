"""Search by an uploaded image: nearest gallery images, and the time of each step."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from app.search_page.upload import BadRequest, Upload
from export.backends.registry import BackendUnavailable, Model, default_threads, models_of
from vpr.artifacts.store import reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA, Catalog, load_catalog
from vpr.imaging.preprocess import ModelInput, Preprocess
from vpr.inference.timing import measure
from vpr.retrieval.embeddings import Forward, embed, l2_normalize, load_embeddings, write_embeddings
from vpr.retrieval.open_set import BestProducts, find_best_products
from vpr.retrieval.search import search
from vpr.retrieval.threshold_command import StoredThreshold, load_threshold

log = get_logger(__name__)

_BACKEND_SECONDS = 0.2  # timing of each backend, if an artifact has several


@dataclass(frozen=True)
class Hit:
    """A gallery image that was found."""

    key: Hashable  # identity, to compare two lists
    row: int | None  # row of the image to show; None if no catalogue has it
    product: str
    score: float  # cosine
    category: str = ""
    metadata: Mapping[str, str | float | None] = field(default_factory=dict)  # of a gallery, by column


@dataclass(frozen=True)
class SearchResult:
    """Gallery images that one model found."""

    hits: Sequence[Hit]  # nearest first
    is_match: bool = True  # whether the best image reaches the threshold
    probability: float | None = None  # probability that its product is right; None without a threshold
    milliseconds: Mapping[str, float] = field(default_factory=dict)  # milliseconds of each step, by name
    name: str = ""  # name of the searcher that found them


@dataclass(frozen=True)
class Searcher(ABC):
    """A model and the images that it searches."""

    name: str  # names of the artifact and the backend
    preprocess: Preprocess  # preprocessing of the model's card
    forward: Forward  # function that runs the model
    sha256: str  # checksum of the card of the artifact

    @abstractmethod
    def describe(self) -> str:
        """Return the name and the number of images that are searched."""

    def columns(self) -> Mapping[str, str]:
        """Return the types of the columns that a condition may use, by name; empty if it may use none."""
        return {}

    def current(self) -> "Searcher":
        """Return the searcher with the model that answers now; a migration of a gallery changes it."""
        return self

    @abstractmethod
    def search(self, upload: Upload, top: int) -> SearchResult:
        """Return the ``top`` nearest images with the time of each step; fewer are returned if there are fewer.

        Raises:
            BadRequest: There are no columns to filter by.
            ImageRejected: The upload is no image.
            InvalidCondition: The condition is invalid.
            UserError: A gallery cannot be read, or is of a model that the page does not have.
        """

    def answer(self, upload: Upload, find: Callable[[NDArray[np.float32]], SearchResult]) -> SearchResult:
        """Embed an upload, and return what a function of its (1, dim) vector finds, with the time of each step."""
        start = time.perf_counter()
        batch = self._read(upload)
        decoded = time.perf_counter()
        query = l2_normalize(self.forward(batch))
        embedded = time.perf_counter()
        result = find(query)
        times = (start, decoded, embedded, time.perf_counter())
        steps = ("decode + preprocess", "embed", "search")
        return replace(result, name=self.name, milliseconds=dict(zip(steps, 1000 * np.diff(times), strict=True)))

    def embed(self, upload: Upload) -> NDArray[np.float32]:
        """Return the (dim,) float32 L2-normalised embedding; raise :class:`ImageRejected` if it is no image."""
        return l2_normalize(self.forward(self._read(upload)))[0]

    def _read(self, upload: Upload) -> ModelInput:
        image = upload.decode(self.preprocess.size)
        return self.preprocess.model_input(self.preprocess.pixels(image)[None])


@dataclass(frozen=True)
class VectorSearcher(Searcher):
    """A model and the gallery images of a catalogue that it embedded."""

    vectors: NDArray[np.float32]  # (gallery, dim) float32, L2-normalised
    gallery: Catalog  # images of the vectors
    threshold: StoredThreshold | None = None  # None answers every image

    def describe(self) -> str:
        """Return the name and the number of images."""
        return f"{self.name}: {len(self.gallery)} gallery images"

    def search(self, upload: Upload, top: int) -> SearchResult:
        """Return the nearest images by exact search."""
        if upload.where:
            raise BadRequest("where: this page has no metadata to filter by. Start it with --galleries.")
        return self.answer(upload, lambda query: self._find(query, top))

    def _find(self, query: NDArray[np.float32], top: int) -> SearchResult:
        scores, rows = search(query, self.vectors, min(top, len(self.vectors)))
        hits = [
            Hit(row, row, str(self.gallery.products[row]), score, str(self.gallery.categories[row]))
            for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
        ]
        if self.threshold is None:
            return SearchResult(hits)
        return judge(hits, self.threshold, find_best_products(query, self.vectors, self.gallery.products))


def judge(hits: Sequence[Hit], threshold: StoredThreshold, best: BestProducts) -> SearchResult:
    """Return hits with the threshold's answer to their query, the only one of ``best``."""
    return SearchResult(hits, bool(threshold.accepts(best)[0]), float(threshold.probability.predict(best)[0]))


def load_searchers(
    models: tuple[str, ...], catalog: str, split: str, embeddings: tuple[str, ...], thresholds: tuple[str, ...] = ()
) -> tuple[list[VectorSearcher], Catalog]:
    """Load each model on its fastest backend here, and the gallery of a split that all of them search.

    The embeddings artifact of each model is written if it does not exist; without ``embeddings`` the gallery is
    embedded in memory. ``thresholds`` are artifacts of ``vpr gallery threshold``, one for each model, or none.
    :class:`UserError` if there is no gallery, a model cannot run here, embeddings are of another model or gallery, or a
    threshold is of another model.
    """
    images = load_catalog(catalog).select(split=split or None)
    gallery = images.select(role="gallery")
    if not len(gallery):
        problem = f"split '{split or 'any'}' has no gallery images"
        if (load_catalog(catalog).roles == "gallery").any():
            raise UserError(f"{catalog}: {problem}. Choose another --split.")
        remedy = 'Give the images the role gallery, see docs/serving.md, "All products of a shop"'
        raise UserError(f"{catalog}: {problem}, and no other split has. {remedy}.")
    searchers = []
    for index, path in enumerate(models):
        model, forward = open_fastest(path)
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
        searchers.append(VectorSearcher(model.name, preprocess, forward, sha256, vectors, gallery, threshold))
    return searchers, gallery


def open_fastest(path: str) -> tuple[Model, Forward]:
    """Load a model on its fastest backend here; raise :class:`UserError` if none can run it."""
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
