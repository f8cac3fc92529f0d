"""From the teacher's dimension to the student's: what is given up, and how little of it may be."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from student.config import DimensionConfig
from vpr.common.errors import UserError

Vectors = NDArray[np.float32]
_BATCH = 1024
_LR = 1e-3


def fit_projection(config: DimensionConfig, vectors: Vectors, dim: int, seed: int) -> Tensor:
    """The (D, d) float32 projection of a method, fitted on (n, D) embeddings of unit length."""
    start = principal_directions(vectors, dim)
    return start if config.method == "pca" else preserve_cosines(vectors, start, config.steps, seed)


def project(vectors: Tensor, projection: Tensor) -> Tensor:
    """(n, D) to (n, d) of unit length."""
    return F.normalize(vectors @ projection, dim=1)


def principal_directions(vectors: Vectors, dim: int) -> Tensor:
    """The d directions of most energy, about the origin: cosines are taken there, so nothing is subtracted.

    Of all projections to d dimensions it changes the inner products least in squared error (Eckart & Young, 1936).

    Raises:
        UserError: more dimensions than the embeddings have, or than there are embeddings.
    """
    most = min(vectors.shape)
    if dim > most:
        raise UserError(
            f"model.embedding_dim: {dim} directions cannot be fitted on {len(vectors)} embeddings of "
            f"{vectors.shape[1]} dimensions: give at most {most}, or raise dimension.images"
        )
    moment = vectors.astype(np.float64).T @ vectors.astype(np.float64)
    _, directions = np.linalg.eigh(moment)
    return torch.from_numpy(directions[:, ::-1][:, :dim].astype(np.float32).copy())


def preserve_cosines(vectors: Vectors, start: Tensor, steps: int, seed: int) -> Tensor:
    """Learn the linear projection whose cosines differ least from those of the whole embeddings.

    min over P of the mean over pairs i, j of w_ij (cos(P^T x_i, P^T x_j) - cos(x_i, x_j))^2, by Adam from
    ``start`` on seeded batches. Half of the weight lies on the pairs as they come, half on the ones that a
    search looks at: w_ij = 1/2 + 1/2 softmax_j(cos(x_i, x_j) / 0.05) n.

    Args:
        vectors: (n, D) of unit length.
        start: (D, d).
        steps: of the optimiser; the learning rate falls to 0 by a cosine.
        seed: of the batches.
    """
    data = torch.from_numpy(vectors)
    projection = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([projection], lr=_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    size = min(_BATCH, len(data))
    for _ in range(steps):
        batch = data[torch.randperm(len(data), generator=generator)[:size]]
        cosines = batch @ batch.T
        weights = 0.5 + 0.5 * size * torch.softmax(cosines.masked_fill(_itself(size), -torch.inf) / 0.05, dim=1)
        short = project(batch, projection)
        loss = (weights * (short @ short.T - cosines).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return projection.detach()


def _itself(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.bool)
