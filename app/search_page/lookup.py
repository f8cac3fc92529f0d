"""A model with the gallery it embedded: an image's bytes in, nearest gallery rows and the time of each step out."""

from __future__ import annotations

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
from vpr.imaging.preprocess import Preprocess
from vpr.inference.timing import measure
from vpr.retrieval.embeddings import Forward, embed, l2_normalize, load_embeddings, write_embeddings
from vpr.retrieval.search import search

log = get_logger(__name__)

_CHOICE_SECONDS = 0.2  # for each backend, where an artifact has several


@dataclass(frozen=True)
class SearchResult:
    """What one model found.

    Attributes:
        rows: (top,) rows of the gallery, nearest first.
        scores: (top,) their cosines.
        milliseconds: of each step, by name.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Searcher:
    """A model and the gallery as it sees it.

    Attributes:
        name: artifact and backend.
        preprocess: its card's.
        forward: runs it.
        vectors: (gallery, dim) float32, L2-normalised.
    """

    name: str
    preprocess: Preprocess
    forward: Forward
    vectors: NDArray[np.float32]

    def search_bytes(self, data: bytes, top: int) -> SearchResult:
        """The ``top`` gallery images nearest to an image given as the bytes of its file.

        Raises:
            ImageRejected: no usable image.
        """
        begun = time.perf_counter()
        image = decode_bytes(data, "upload", shortest=self.preprocess.size)
        batch = self.preprocess.normalise(self.preprocess.pixels(image)[None])
        decoded = time.perf_counter()
        query = l2_normalize(self.forward(batch))
        embedded = time.perf_counter()
        scores, rows = search(query, self.vectors, top)
        ends = (begun, decoded, embedded, time.perf_counter())
        steps = ("decode + preprocess", "embed", "search")
        return SearchResult(rows[0], scores[0], dict(zip(steps, 1000 * np.diff(ends), strict=True)))


def load_searchers(
    models: tuple[str, ...], catalog: str, split: str, embeddings: tuple[str, ...]
) -> tuple[list[Searcher], Catalog]:
    """Each model with its backend that is fastest here, and the gallery that all of them search.

    Args:
        models: artifacts that embed images.
        catalog: catalogue artifact.
        split: whose gallery is searched; empty takes every split's.
        embeddings: for each model the artifact that keeps the catalogue's embeddings, made where it is not there
            yet; none embeds the gallery anew.

    Raises:
        UserError: no gallery, a model that cannot run here, embeddings of another model or gallery.
    """
    gallery = load_catalog(catalog).select(split=split or None, role="gallery")
    if not len(gallery):
        raise UserError(f"{catalog}: has no gallery images of split '{split or 'any'}': choose another --split")
    searchers = []
    for place, path in enumerate(models):
        model, forward = _open_fastest(path)
        preprocess = model.preprocess
        if embeddings:
            vectors = _kept_vectors(embeddings[place], model, forward, (catalog, split), gallery)
        else:
            with _counting(forward, model.name, len(gallery)) as counted:
                vectors = embed(gallery, preprocess, counted)
        log.info(f"  {model.name}: {len(vectors)} gallery images, {vectors.shape[1]} dimensions")
        searchers.append(Searcher(model.name, preprocess, forward, vectors))
    return searchers, gallery


def agreement(found: list[SearchResult]) -> str:
    """How far two models' lists agree, in a sentence; empty for one list."""
    if len(found) == 1:
        return ""
    first, second = (one.rows for one in found)
    same = "The same first image" if first[0] == second[0] else "Different first images"
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
        raise UserError(f"{path}: cannot run here: {'; '.join(reasons)}")
    if len(opened) == 1:
        return next(iter(opened.values()))
    one = next(iter(opened.values()))[0].random_input(1)
    calls = {name: (lambda forward=forward: forward(one)) for name, (_, forward) in opened.items()}
    times = {name: float(np.median(values)) for name, values in measure(calls, _CHOICE_SECONDS).items()}
    return opened[min(times, key=lambda name: times[name])]


def _kept_vectors(
    path: str, model: Model, forward: Forward, source: tuple[str, str], gallery: Catalog
) -> NDArray[np.float32]:
    """The gallery's vectors from an embeddings artifact, which is made if it is not there and never replaced."""
    catalog, split = source
    if not Path(path).exists():
        part = load_catalog(catalog).select(split=split or None)
        with _counting(forward, model.name, len(part)) as counted:
            vectors = embed(part, model.preprocess, counted)
        write_embeddings(path, vectors, part, model.artifact, {"split": split, "backend": model.backend})
    kept = load_embeddings(path)
    if model.artifact.as_parent("model") not in kept.artifact.card.parents:
        raise UserError(f"{path}: was not embedded with {model.artifact.path}: give that model's, or a new path")
    with reraise_as_artifact_error(kept.artifact):
        rows = pq.read_table(kept.artifact.file("rows.parquet")).cast(SCHEMA)
    chosen = kept.roles == "gallery"
    if split:
        chosen &= np.array(rows["split"].to_pylist(), dtype=np.str_) == split
    if not rows.filter(chosen).equals(gallery.table):
        raise UserError(f"{path}: holds other images than {catalog}'s gallery: embed again, or give a new path")
    return kept.vectors[chosen]


@contextmanager
def _counting(forward: Forward, name: str, total: int) -> Iterator[Forward]:
    """The same function, shown as a bar of the images that went through it."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"  {name}: embedding", total=total)

        def counted(batch: NDArray[np.float32]) -> NDArray[np.float32]:
            vectors = forward(batch)
            progress.advance(task, len(batch))
            return vectors

        yield counted
