"""Search in galleries by an uploaded image: each search opens the newest version, so that changes show at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from app.search_page.images import GalleryImages
from app.search_page.lookup import Hit, Searcher, SearchResult, judge, open_fastest
from app.search_page.upload import Upload
from export.backends.registry import MODEL_KINDS, Model
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import load_catalog
from vpr.gallery.gallery import CALIBRATE, IDS, Gallery, load_gallery
from vpr.gallery.nearest import find_best, find_nearest, usable_probes
from vpr.gallery.store import Snapshot
from vpr.retrieval.embeddings import Forward
from vpr.retrieval.threshold_command import StoredThreshold, load_threshold
from vpr.retrieval.threshold_scope import check_filter

log = get_logger(__name__)


@dataclass(frozen=True)
class GallerySearcher(Searcher):
    """A gallery and its model, which embeds the queries.

    ``others`` search the same gallery by other models, once a migration to one of these has begun.
    """

    path: str  # folder of the gallery
    dim: int  # dimension of the model's embeddings
    rows: Mapping[tuple[str, str], int]  # row of the image to show, by product and image id
    threshold: StoredThreshold | None = None  # in place of the stored one
    probes: int = 0  # partitions of the index to search; 0 compares with all images
    others: tuple[GallerySearcher, ...] = ()

    def describe(self) -> str:
        """Return the name, the number of images and the newest version."""
        gallery = load_gallery(self.path)
        snapshot = gallery.snapshot()
        name = (self._with_model_of(gallery, snapshot) or self).name
        return f"{name}: {len(snapshot)} gallery images, version {snapshot.version}"

    def columns(self) -> Mapping[str, str]:
        """Return the types of the ids and of the metadata columns."""
        return {**dict.fromkeys(IDS, "text"), **load_gallery(self.path).columns}

    def current(self) -> GallerySearcher:
        """Return the searcher with the newest version's model."""
        gallery = load_gallery(self.path)
        return self.select(gallery, gallery.snapshot())

    def search(self, upload: Upload, top: int) -> SearchResult:
        """Return the nearest images of the newest version that fulfil the condition, by that version's model."""
        gallery = load_gallery(self.path)  # read again, because its threshold may have changed

        def search(snapshot: Snapshot) -> SearchResult:
            own = self.select(gallery, snapshot)
            return own.answer(upload, lambda query: own._find(gallery, snapshot, query, top, upload.where))

        return gallery.search_newest(search)

    def select(self, gallery: Gallery, snapshot: Snapshot) -> GallerySearcher:
        """Return the searcher with a version's model; raise :class:`UserError` for another model or dimension."""
        own, found = gallery.model_of(snapshot), self._with_model_of(gallery, snapshot)
        if found is None:
            problem = f"it is of model '{own.model.name}' by now"
            raise UserError(f"galleries: {self.path}: {problem}. Start the page again with that model.")
        if own.dim != found.dim:
            problem = f"{own.dim} dimensions, the model '{own.model.name}' gives {found.dim}"
            raise UserError(f"galleries: {self.path}: {problem}. Export a graph with them, or embed it again.")
        return found

    def _with_model_of(self, gallery: Gallery, snapshot: Snapshot) -> GallerySearcher | None:
        sha256 = gallery.model_of(snapshot).model.sha256
        return next((searcher for searcher in (self, *self.others) if searcher.sha256 == sha256), None)

    def _find(
        self, gallery: Gallery, snapshot: Snapshot, query: NDArray[np.float32], top: int, where: str
    ) -> SearchResult:
        probes = usable_probes(snapshot, self.probes)
        nearest = find_nearest(snapshot, query, top, where, probes)
        found = nearest.found[0]
        table = snapshot.take(nearest.rows[0][found], [*IDS, *gallery.columns])
        hits = []
        for values, score in zip(table.to_pylist(), nearest.scores[0][found].tolist(), strict=True):
            key = (values["product"], values["image"])
            metadata = {name: values[name] for name in gallery.columns}
            hits.append(Hit(key, self.rows.get(key), values["product"], score, metadata=metadata))
        threshold = self.threshold or gallery.threshold(snapshot)
        if threshold is None or not hits:
            return SearchResult(hits)
        return judge(hits, threshold, find_best(snapshot, query, where, probes))


def load_gallery_searchers(
    models: Sequence[str],
    galleries: Sequence[str],
    catalogs: Sequence[str],
    thresholds: Sequence[str] = (),
    probes: int = 0,
) -> tuple[list[GallerySearcher], GalleryImages]:
    """Load galleries, their models on the fastest backend here, and the images of catalogues.

    Args:
        models: Artifacts of the galleries' models, in any order; two galleries may have the same model. Other models
            answer once a gallery is migrated to them.
        galleries: Galleries.
        catalogs: Catalogues of the images; those that no catalogue has are not shown.
        thresholds: Artifact of ``vpr gallery threshold`` for each gallery in place of the stored ones; or none.
        probes: Partitions of the index to search; 0 compares with all images.

    Raises:
        UserError: The model of a gallery is missing, a model cannot run here, or an artifact is invalid.
    """
    artifacts = [load_artifact(path, MODEL_KINDS) for path in models]
    opened_galleries = [load_gallery(path) for path in galleries]
    snapshots = [gallery.snapshot() for gallery in opened_galleries]
    _check_models(artifacts, opened_galleries, snapshots)  # before the models are loaded, which takes seconds
    images = GalleryImages([load_catalog(path) for path in catalogs])
    opened = {artifact.sha256: open_fastest(str(artifact.path)) for artifact in artifacts}
    searchers: list[GallerySearcher] = []
    for index, (gallery, snapshot) in enumerate(zip(opened_galleries, snapshots, strict=True)):
        own = gallery.model_of(snapshot)
        threshold = load_threshold(thresholds[index], own.model, own.dim) if thresholds else None
        made = {sha256: _make_searcher(gallery, *model, images, probes) for sha256, model in opened.items()}
        searcher = replace(made.pop(own.model.sha256), threshold=threshold, others=tuple(made.values()))
        searcher.select(gallery, snapshot)
        _report(searcher, gallery, snapshot, bool(threshold))
        searchers.append(searcher)
    return searchers, images


def _check_models(artifacts: Sequence[Artifact], galleries: Sequence[Gallery], snapshots: Sequence[Snapshot]) -> None:
    """Raise :class:`UserError` if a gallery lacks its model, and warn of models that no gallery has now."""
    needed = [gallery.model_of(snapshot).model for gallery, snapshot in zip(galleries, snapshots, strict=True)]
    given = {artifact.sha256 for artifact in artifacts}
    for gallery, model in zip(galleries, needed, strict=True):
        if model.sha256 not in given:
            names = ", ".join(artifact.card.name for artifact in artifacts)
            problem = f"{gallery.path} is of model '{model.name}', got {names}"
            raise UserError(f"models: {problem}. Pass the artifact that embedded the gallery.")
    used = {model.sha256 for model in needed}
    if unused := [str(artifact.path) for artifact in artifacts if artifact.sha256 not in used]:
        problem = f"no gallery is of {', '.join(unused)} now"
        log.warning(f"models: {problem}. It answers once `vpr gallery migrate` has begun, else leave it out.")


def _make_searcher(
    gallery: Gallery,
    model: Model,
    forward: Forward,
    images: GalleryImages,
    probes: int,
) -> GallerySearcher:
    card = model.artifact.card
    if card.embedding is None:
        raise UserError(f"{model.artifact.path}: the card has no embedding. Create the artifact again.")
    name, sha256, dim = f"{gallery.path.name}, {model.name}", model.artifact.sha256, card.embedding.dim
    path = str(gallery.path)
    return GallerySearcher(name, model.preprocess, forward, sha256, path, dim, images.places, probes=probes)


def _report(searcher: GallerySearcher, gallery: Gallery, snapshot: Snapshot, is_replaced: bool) -> None:
    """Log the gallery, and warn of images that cannot be shown and of an old threshold."""
    log.info(f"  {searcher.describe()}")
    columns = (column.to_pylist() for column in snapshot.read(IDS).select(IDS).columns)
    if missing := sum(key not in searcher.rows for key in zip(*columns, strict=True)):
        problem = f"{missing} of {len(snapshot)} images are in none of the catalogues and cannot be shown"
        log.warning(f"catalogs: {gallery.path}: {problem}. Add their catalogues.")
    if not is_replaced and gallery.is_threshold_outgrown(snapshot):
        log.warning(f"threshold: the stored one is of an earlier model, so all queries are answered. {CALIBRATE}.")
    if threshold := searcher.threshold or gallery.threshold(snapshot):
        gallery.check_size(snapshot, threshold)
        check_filter(threshold)
