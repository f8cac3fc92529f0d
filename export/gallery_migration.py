"""``vpr gallery migrate``: give a gallery a new model, and embed its images with it in the order of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.config import EmbedConfig
from export.embed import load_model
from export.migrate_config import MigrateConfig
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.gallery.gallery import load_gallery
from vpr.gallery.migrate import Pending, list_pending, log_progress, replace_adapted, start_migration
from vpr.gallery.plan import Plan, load_plan
from vpr.gallery.store import Vectors
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.cut import cut_vectors
from vpr.retrieval.embed_job import EmbedModel
from vpr.retrieval.embeddings import Forward, embed

log = get_logger(__name__)

Place = tuple[int, int]  # catalogue, row


@dataclass(frozen=True)
class Images:
    """Images of a gallery in catalogues.

    Attributes:
        catalogs: Catalogues.
        places: Catalogue and row of each image by product and image id.
    """

    catalogs: Sequence[Catalog]
    places: dict[tuple[str, str], Place]

    def embed(
        self, chosen: Sequence[Pending], preprocess: Preprocess, forward: Forward, batch: int, threads: int
    ) -> Vectors:
        """Return the (n, dim) float32 embeddings of images; :class:`UserError` if one cannot be read."""
        places = [self.places[pending.product, pending.image] for pending in chosen]
        numbers = np.array([number for number, _ in places])
        rows = np.array([row for _, row in places], dtype=np.int64)
        parts: list[tuple[np.ndarray, Vectors]] = []
        for number in np.unique(numbers):
            used = np.flatnonzero(numbers == number)
            parts.append((used, embed(self.catalogs[number].take(rows[used]), preprocess, forward, batch, threads)))
        vectors = np.concatenate([values for _, values in parts])
        return vectors[np.argsort(np.concatenate([used for used, _ in parts]))]


def migrate_gallery(config: MigrateConfig) -> Path:
    """Write the version with the adapter's vectors, if it is not there, then embed the next images of the order.

    All inputs are checked before the gallery changes. A run that was killed resumes.

    Raises:
        UserError: The plan or the model is another one, or an image of the gallery is missing.
    """
    gallery, plan = load_gallery(config.gallery), load_plan(config.plan)
    model = _load_model(config, plan) if config.model else None
    pending = list_pending(gallery, plan)
    images = _find_images(config, pending)
    start_migration(gallery, plan)
    if model is not None and pending:
        available = [one for one in pending if (one.product, one.image) in images.places]
        chosen = available[: config.rows or None]
        forward, preprocess, own = model.open(), plan.target.preprocess, model.artifact.card.embedding
        assert preprocess is not None
        assert own is not None
        dimensions = plan.target.dim if plan.target.dim < own.dim else 0
        for start in range(0, len(chosen), config.rows_per_version):
            part = chosen[start : start + config.rows_per_version]
            vectors = images.embed(part, preprocess, forward, config.batch_size, config.threads)
            replace_adapted(gallery, plan.target, part, cut_vectors(vectors, dimensions))
            log_progress(gallery)
    else:
        log_progress(gallery)
    return gallery.path


def _load_model(config: MigrateConfig, plan: Plan) -> EmbedModel:
    """Load the new model; raise :class:`UserError` if it is not that of the plan."""
    values = EmbedConfig(config.model, config.catalogs[0], "", batch_size=config.batch_size, backend=config.backend)
    loaded = load_model(values)
    target, artifact = plan.target, loaded.artifact
    if artifact.sha256 != target.model.sha256:
        problem = f"{config.model} is not the new model '{target.model.name}' of {config.plan}"
        raise UserError(f"model: {problem}. Choose that model, or plan a migration to this one.")
    if target.preprocess is None or artifact.card.embedding is None or artifact.card.embedding.dim < target.dim:
        raise UserError(f"model: {config.model}: no preprocessing, or fewer dimensions than {config.plan}. Plan again.")
    return loaded


def _find_images(config: MigrateConfig, pending: Sequence[Pending]) -> Images:
    """Find the images to embed; raise :class:`UserError` if one is missing, unless these are left out."""
    catalogs = [load_catalog(path) for path in config.catalogs]
    wanted = {(one.product, one.image) for one in pending}
    places: dict[tuple[str, str], Place] = {}
    for number, catalog in enumerate(catalogs):
        # A query may be the same file with a box.
        rows = np.argsort(catalog.roles != "gallery", kind="stable")
        names = catalog.table["image"].to_pylist()
        for row in rows.tolist():
            key = (str(catalog.products[row]), names[row])
            if key in wanted and key not in places and catalog.path(row).is_file():
                places[key] = (number, row)
    missing = [one for one in pending if (one.product, one.image) not in places]
    if catalogs and missing and not config.skip_missing:
        first = f"image '{missing[0].image}' of product '{missing[0].product}'"
        problem = f"{len(missing)} of {len(pending)} images are in no catalogue or have no file, first {first}"
        raise UserError(f"catalogs: {problem}. Add their catalogue, or set --skip-missing.")
    return Images(catalogs, places)
