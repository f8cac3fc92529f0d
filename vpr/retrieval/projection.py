"""Linear projections of unit vectors to fewer dimensions, fitted to keep their cosines.

:func:`principal_rotation` gives nested embeddings without training. It keeps all cosines, and of all rotations its
first d dimensions keep the inner products best, for every d.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Vectors = NDArray[np.float32]
_BATCH = 1024
_LR = 1e-3


def project(vectors: Tensor, projection: Tensor) -> Tensor:
    """Return (n, d) float32 vectors of unit length from (n, D) vectors, in full precision also under autocast."""
    with torch.autocast(vectors.device.type, enabled=False):
        return F.normalize(vectors.float() @ projection, dim=1)


def principal_directions(vectors: Vectors, dim: int) -> Tensor:
    """Return the (D, d) directions of most energy about the origin.

    Nothing is subtracted, because cosines are taken about the origin. Of all projections to d dimensions this one
    changes the inner products least in squared error (Eckart & Young, 1936).

    Raises:
        ValueError: d is more than D or n.
    """
    if dim > min(vectors.shape):
        raise ValueError(f"{len(vectors)} vectors of {vectors.shape[1]} dimensions have no {dim} directions")
    return principal_rotation(vectors)[:, :dim].clone()


def principal_rotation(vectors: Vectors) -> Tensor:
    """Return the (D, D) float32 orthogonal matrix of all principal directions of (n, D) vectors, most energy first.

    ``project(x, rotation)`` keeps the cosines of x. ``project(x, rotation[:, :d])`` equals the first d dimensions of
    that, renormalised, and is the reduction of :func:`principal_directions`. Fewer vectors than dimensions suffice: the
    remaining directions, without energy, come last.
    """
    moment = vectors.astype(np.float64).T @ vectors.astype(np.float64)
    _, directions = np.linalg.eigh(moment)
    return torch.from_numpy(directions[:, ::-1].astype(np.float32).copy())


def preserve_cosines(vectors: Vectors, start: Tensor, steps: int, seed: int) -> Tensor:
    """Learn the linear (D, d) projection that preserves cosines of (n, D) unit vectors best.

    min over P of the mean over pairs i, j of w_ij (cos(P^T x_i, P^T x_j) - cos(x_i, x_j))^2, by Adam from
    ``start`` on seeded batches; the learning rate falls to 0 by a cosine. Half of the weight is uniform, half is on the
    pairs that a search ranks first: w_ij = 1/2 + 1/2 softmax_j(cos(x_i, x_j) / 0.05) n.
    """
    data = torch.from_numpy(vectors)
    projection = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([projection], lr=_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    size = min(_BATCH, len(data))
    diagonal = torch.eye(size, dtype=torch.bool)
    for _ in range(steps):
        batch = data[torch.randperm(len(data), generator=generator)[:size]]
        cosines = batch @ batch.T
        weights = 0.5 + 0.5 * size * torch.softmax(cosines.masked_fill(diagonal, -torch.inf) / 0.05, dim=1)
        projected = project(batch, projection)
        loss = (weights * (projected @ projected.T - cosines).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return projection.detach()
