"""Embedding a catalogue with any model, and the artifact that keeps the vectors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpr.artifacts.store import Artifact, Embedding, Parent, load_artifact, reraise_as_artifact_error, write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.pixels import read_pixels
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.metrics import RetrievalScores, evaluate

Forward = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def read_batches(
    catalog: Catalog, preprocess: Preprocess, batch_size: int, threads: int = 0
) -> Iterator[NDArray[np.float32]]:
    """The catalogue as model inputs, (<= batch_size, 3, size, size) float32, in order.

    ``threads`` decode the batches that come next while the caller is busy with one; 0 decodes when asked.
    """
    blocks = [range(start, min(start + batch_size, len(catalog))) for start in range(0, len(catalog), batch_size)]
    if not threads:
        yield from (preprocess.normalise(read_pixels(catalog, preprocess, rows)) for rows in blocks)
        return
    ahead: deque[Future[NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for rows in blocks:
            ahead.append(pool.submit(read_pixels, catalog, preprocess, rows))
            if len(ahead) > threads:
                yield preprocess.normalise(ahead.popleft().result())
        while ahead:
            yield preprocess.normalise(ahead.popleft().result())


def embed(
    catalog: Catalog, preprocess: Preprocess, forward: Forward, batch_size: int = 64, threads: int = 0
) -> NDArray[np.float32]:
    """Embed every image of a catalogue.

    Args:
        catalog: n images.
        preprocess: the card's.
        forward: (batch, 3, size, size) float32 to (batch, dim) float32.
        batch_size: images at a time.
        threads: that decode ahead.

    Returns:
        (n, dim) float32, L2-normalised.

    Raises:
        UserError: an empty catalogue, an image that cannot be read, or a vector without direction.
    """
    if not len(catalog):
        raise UserError("embedding: the catalogue has no images of this split and role: choose another")
    return l2_normalize(
        np.concatenate([forward(batch) for batch in read_batches(catalog, preprocess, batch_size, threads)])
    )


def l2_normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each row to length 1; :class:`UserError` where a row is zero or not finite."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise UserError("embedding: the model gave a zero or non-finite vector: check its weights and preprocessing")
    return (vectors / lengths).astype(np.float32)


def score_split(catalog: Catalog, vectors: NDArray[np.float32]) -> RetrievalScores:
    """Recall of query images against gallery images of one split, whose vectors are given in order."""
    query, gallery = catalog.roles == "query", catalog.roles == "gallery"
    return evaluate(vectors[query], catalog.products[query], vectors[gallery], catalog.products[gallery])


@dataclass(frozen=True)
class Embeddings:
    """Vectors with the catalogue rows they belong to.

    Attributes:
        vectors: (n, dim) float32, L2-normalised.
        images: (n,) paths as in the catalogue.
        products: (n,) product ids.
        roles: (n,) roles.
        artifact: where they come from.
    """

    vectors: NDArray[np.float32]
    images: NDArray[np.str_]
    products: NDArray[np.str_]
    roles: NDArray[np.str_]
    artifact: Artifact

    @property
    def model(self) -> Parent:
        """What they were computed with; :class:`UserError` if their card names nothing."""
        models = self.artifact.parents("model")
        if not models:
            raise UserError(f"{self.artifact.path}: its card names no model: embed the catalogue again")
        return models[0]

    def rows_with_role(self, role: str) -> NDArray[np.int64]:
        """Rows of a role; all of them, if none has it."""
        rows = np.flatnonzero(self.roles == role)
        return rows if len(rows) else np.arange(len(self.roles))


def write_embeddings(
    path: str, vectors: NDArray[np.float32], catalog: Catalog, model: Artifact, config: dict[str, Any]
) -> Path:
    """Write ``vectors.npy`` and ``rows.parquet`` as an artifact whose parents are the model and the catalogue."""
    parents = [model.as_parent("model"), *catalog.as_parents()]
    with write_artifact(path, "embeddings", config, parents) as draft:
        np.save(draft.path / "vectors.npy", vectors, allow_pickle=False)
        pq.write_table(catalog.table, draft.path / "rows.parquet")
        draft.preprocess = model.card.preprocess
        draft.embedding = Embedding(dim=vectors.shape[1], normalised=True, dtype="float32")
        draft.catalog = catalog.summary()
        if catalog.artifact:
            draft.metrics = {"set_aside": catalog.artifact.card.metrics.get("set_aside", 0)}
    return Path(path)


def load_embeddings(path: Path | str) -> Embeddings:
    """Load an embeddings artifact; :class:`UserError` if its files do not fit its card."""
    artifact = load_artifact(path, "embeddings")
    with reraise_as_artifact_error(artifact):
        vectors = np.load(artifact.file("vectors.npy"), allow_pickle=False)
        rows = pq.read_table(artifact.file("rows.parquet"), columns=["image", "product", "role"])
        columns = [np.array(rows[name].to_pylist(), dtype=np.str_) for name in ("image", "product", "role")]
    embedding = artifact.card.embedding
    if embedding is None or vectors.shape != (len(rows), embedding.dim):
        raise UserError(f"{artifact.path}: vectors {vectors.shape} do not fit its rows and card: embed again")
    if vectors.dtype != np.float32 or not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
        raise UserError(f"{artifact.path}: its vectors are not float32 of length 1: embed again")
    return Embeddings(vectors, columns[0], columns[1], columns[2], artifact)


def torch_forward(model: Any) -> Forward:
    """A PyTorch module as a function of arrays, without gradients, on the module's device."""
    import torch

    device = next(model.parameters()).device

    def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return model(torch.from_numpy(batch).to(device)).float().cpu().numpy()

    return forward
