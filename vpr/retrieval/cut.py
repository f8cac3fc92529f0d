"""Embeddings cut to their first dimensions, as nested models are trained for."""

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.store import Artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.retrieval.embeddings import l2_normalize

log = get_logger(__name__)


def cut_vectors(vectors: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """Return the first ``dimensions`` of (n, dim) float32 vectors, scaled to length 1; 0 returns all as they are.

    Raises:
        UserError: The first dimensions of a vector are all zero or not finite.
    """
    return l2_normalize(vectors[:, :dimensions]) if dimensions else vectors


def check_dimensions(model: Artifact, dimensions: int) -> None:
    """Raise :class:`UserError` if a model has fewer dimensions; log if it was not trained for this prefix."""
    embedding = model.card.embedding
    if embedding is None:
        raise UserError(f"{model.path}: the card has no embedding. Create the artifact again.")
    if dimensions > embedding.dim:
        problem = f"expected at most the {embedding.dim} of {model.path}, got {dimensions}"
        raise UserError(f"dimensions: {problem}. Lower it.")
    if dimensions < embedding.dim and dimensions not in embedding.nested:
        trained = ", ".join(map(str, embedding.nested)) or "none"
        log.info(f"dimensions: {model.card.name} was not trained for {dimensions} (nested dimensions: {trained})")
