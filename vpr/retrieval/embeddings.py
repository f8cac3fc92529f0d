"""Embedding with any model, and the artifact that stores the vectors."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpr.artifacts.card import Embedding, Parent
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.artifacts.writer import write_artifact
from vpr.common.arrays import read_array
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.parquet_table import read_text_columns
from vpr.data.pixels import KeptPixels, read_pixels
from vpr.data.readers import UNLABELLED
from vpr.data.seen import record_seen
from vpr.imaging.preprocess import ModelInput, Preprocess
from vpr.retrieval.metrics import RetrievalScores, evaluate
from vpr.retrieval.self_search import find_self_search

Forward = Callable[[ModelInput], NDArray[np.float32]]
log = get_logger(__name__)


def read_batches(
    catalog: Catalog, preprocess: Preprocess, batch_size: int, threads: int = 0, kept: KeptPixels | None = None
) -> Iterator[ModelInput]:
    """Yield model inputs in order, up to ``batch_size`` images each: normalised float32, or uint8 pixels.

    ``threads`` is the number of background decoding threads; 0 decodes in the calling thread. ``kept`` has the pixels
    of images that were read before.
    """
    read_rows = kept.read if kept else read_pixels
    blocks = [range(start, min(start + batch_size, len(catalog))) for start in range(0, len(catalog), batch_size)]

    def read(rows: range) -> ModelInput:
        return preprocess.model_input(read_rows(catalog, preprocess, rows))

    if not threads:
        yield from map(read, blocks)
        return
    pending: deque[Future[ModelInput]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for rows in blocks:
            pending.append(pool.submit(read, rows))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def embed(
    catalog: Catalog,
    preprocess: Preprocess,
    forward: Forward,
    batch_size: int = 64,
    threads: int = 0,
    kept: KeptPixels | None = None,
) -> NDArray[np.float32]:
    """Embed every image of a catalogue: (n, dim) float32, L2-normalised.

    ``forward`` maps the model's input, such as (batch, 3, size, size) float32, to (batch, dim) float32.
    ``threads`` decode in the background. ``kept`` spares the decoding where another model has read the images.

    Raises:
        UserError: The catalogue is empty, an image cannot be read, or a vector is zero or not finite.
    """
    if not len(catalog):
        raise UserError("embedding: the catalogue has no images of this split and role. Choose another.")
    batches = read_batches(catalog, preprocess, batch_size, threads, kept)
    return l2_normalize(np.concatenate([forward(batch) for batch in batches]))


def l2_normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each row to length 1; raise :class:`UserError` if a row is zero or not finite."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise UserError("embedding: the model returned a zero or non-finite vector. Check weights and preprocessing.")
    return (vectors / lengths).astype(np.float32)


def score_split(catalog: Catalog, vectors: NDArray[np.float32]) -> RetrievalScores:
    """Score the query images of one split against its gallery images; ``vectors`` are in catalogue order.

    Where the queries and the gallery are the same images, each searches the others, and images without another one of
    their product do not search (:func:`vpr.retrieval.self_search.find_self_search`).
    """
    products = catalog.products
    if (own := find_self_search(catalog)) is not None:
        return evaluate(
            vectors[own.queries], products[own.queries], vectors[own.gallery], products[own.gallery], own=own.own
        )
    query, gallery = catalog.roles == "query", catalog.roles == "gallery"
    return evaluate(vectors[query], products[query], vectors[gallery], products[gallery])


@dataclass(frozen=True)
class Embeddings:
    """Embeddings and their catalogue rows.

    Attributes:
        vectors: (n, dim) float32, L2-normalised.
        images: (n,) image paths as in the catalogue.
        products: (n,) product ids.
        roles: (n,) roles.
        artifact: Embeddings artifact.
    """

    vectors: NDArray[np.float32]
    images: NDArray[np.str_]
    products: NDArray[np.str_]
    roles: NDArray[np.str_]
    artifact: Artifact

    @property
    def model(self) -> Parent:
        """Model of the embeddings; raises :class:`UserError` if the card names none."""
        models = self.artifact.parents("model")
        if not models:
            raise UserError(f"{self.artifact.path}: the card names no model. Embed the catalogue again.")
        return models[0]

    def read_rows(self) -> Catalog:
        """Return image, box, checksum, product, role and split of each row, as a catalogue without a folder."""
        columns = ["image", "box", "sha256", "product", "role", "split"]
        with reraise_as_artifact_error(self.artifact):
            table = pq.read_table(self.artifact.file("rows.parquet"), columns=columns)
            return Catalog(table.cast(pa.schema([SCHEMA.field(name) for name in columns])), Path())

    def rows_with_role(self, role: str) -> NDArray[np.int64]:
        """Return the rows with a role, or all rows if no row has it."""
        rows = np.flatnonzero(self.roles == role)
        return rows if len(rows) else np.arange(len(self.roles))

    def gallery_rows(self) -> NDArray[np.int64]:
        """Return the rows with the role ``gallery``, or all rows; warn if products have none of them."""
        rows = self.rows_with_role("gallery")
        products, every = (
            np.unique(names[~np.char.startswith(names, f"{UNLABELLED}/")])
            for names in (self.products[rows], self.products)
        )
        if len(products) < len(every):
            counts = f"{len(rows)} of {len(self.roles)} images ({len(products)} of {len(every)} products)"
            problem = "are gallery images; the others are training or query images and are left out"
            remedy = 'To search all products, see docs/serving.md, "All products of a shop"'
            log.warning(f"{self.artifact.path}: {counts} {problem}. {remedy}.")
        return rows


def write_embeddings(
    path: str, vectors: NDArray[np.float32], catalog: Catalog, model: Artifact, config: dict[str, Any]
) -> Path:
    """Write ``vectors.npy`` and ``rows.parquet`` as an artifact; its parents are the model and the catalogue."""
    parents = [model.as_parent("model"), *catalog.as_parents()]
    with write_artifact(path, "embeddings", config, parents) as draft:
        np.save(draft.path / "vectors.npy", vectors, allow_pickle=False)
        pq.write_table(catalog.table, draft.path / "rows.parquet")
        record_seen(draft.path, [model])
        draft.preprocess = model.card.preprocess
        dim, of_model = vectors.shape[1], model.card.embedding
        nested = [] if of_model is None else of_model.cut(dim).nested
        draft.embedding = Embedding(dim=dim, normalised=True, dtype="float32", nested=nested)
        draft.catalog = catalog.summary()
        if catalog.artifact:
            draft.metrics = {"set_aside": catalog.artifact.card.metrics.get("set_aside", 0)}
    return Path(path)


def load_embeddings(path: Path | str) -> Embeddings:
    """Load an embeddings artifact; raise :class:`UserError` if its files contradict its card."""
    artifact = load_artifact(path, "embeddings")
    with reraise_as_artifact_error(artifact):
        vectors = read_array(artifact.file("vectors.npy"))
        columns = read_text_columns(artifact.file("rows.parquet"), ["image", "product", "role"])
    embedding = artifact.card.embedding
    if embedding is None or vectors.shape != (len(columns[0]), embedding.dim):
        raise UserError(f"{artifact.path}: vectors of shape {vectors.shape} do not match rows and card. Embed again.")
    if vectors.dtype != np.float32 or not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
        raise UserError(f"{artifact.path}: the vectors are not float32 of length 1. Embed again.")
    return Embeddings(vectors, columns[0], columns[1], columns[2], artifact)


def torch_forward(model: Any) -> Forward:
    """Return a function that runs a PyTorch module on arrays, without gradients, on the module's device."""
    import torch

    device = next(model.parameters()).device

    def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return model(torch.from_numpy(batch).to(device)).float().cpu().numpy()

    return forward
