"""Network that joins several teachers: each embedding whitened, then concatenated and reduced.

Whitening gives every teacher's directions equal variance before fusion, as in Whiten-MTD (Tang et al., "Whitening
Multi-Teacher Distillation for Image Retrieval", 2024). The reduction keeps the cosines of the concatenation.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.projection import project

# These bound what an untrusted card can allocate: at most 256 MiB of whitening for each teacher.
MAX_TEACHERS, MAX_WIDTH = 8, 8192
_SHARED = ("resize", "crop", "crop_pct", "interpolation")


class WhitenedPart(nn.Module):
    """A teacher with its input conversion and its whitening.

    ``network`` maps (batch, 3, own.size, own.size), normalised by ``own``, to L2-normalised (batch, dim) float32.
    ``forward`` takes (batch, 3, shared.size, shared.size), normalised by ``shared``.
    """

    scale: Tensor
    offset: Tensor
    mean: Tensor
    matrix: Tensor

    def __init__(self, network: nn.Module, dim: int, own: Preprocess, shared: Preprocess) -> None:
        super().__init__()
        if dim > MAX_WIDTH:
            raise UserError(f"models: expected teachers of at most {MAX_WIDTH} dimensions, got {dim}. Reduce it.")
        self.network, self.size = network, own.size
        own_std, shared_std = (np.array(values.std) for values in (own, shared))
        scale, offset = shared_std / own_std, (np.array(shared.mean) - np.array(own.mean)) / own_std
        # The card's preprocessing decides both, so they are not stored with the weights.
        for name, values in (("scale", scale), ("offset", offset)):
            tensor = torch.from_numpy(values.astype(np.float32))[:, None, None]
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))

    def embed(self, x: Tensor) -> Tensor:
        """Return the teacher's own embeddings, L2-normalised (batch, dim) float32."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if x.shape[-1] != self.size:
                x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
            x = x * self.scale + self.offset
        embeddings: Tensor = self.network(x)
        return embeddings.float()

    def forward(self, x: Tensor) -> Tensor:
        """Return whitened embeddings of unit length, so that every teacher has the same weight for every image."""
        embeddings = self.embed(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize((embeddings - self.mean) @ self.matrix, dim=1)


class FusedTeacher(nn.Module):
    """Several teachers as one network from images to L2-normalised embeddings.

    ``embedding_dim`` 0 keeps the concatenation. Its cosine is then the mean of the teachers' whitened cosines.
    """

    reduction: Tensor | None

    def __init__(self, parts: Sequence[WhitenedPart], embedding_dim: int) -> None:
        super().__init__()
        self.parts = cast("Sequence[WhitenedPart]", nn.ModuleList(parts))
        width = sum(len(part.mean) for part in parts)
        self.embedding_dim = embedding_dim or width
        if self.embedding_dim > width:
            teachers = f"the {len(parts)} teachers have {width} dimensions together"
            raise UserError(f"embedding_dim: {teachers}, got {embedding_dim}. Lower it.")
        is_reduced = self.embedding_dim < width
        if is_reduced and self.embedding_dim > MAX_WIDTH:
            raise UserError(f"embedding_dim: expected 0 or at most {MAX_WIDTH}, got {embedding_dim}. Lower it.")
        self.register_buffer("reduction", torch.eye(width, self.embedding_dim) if is_reduced else None)

    def concatenate(self, x: Tensor) -> Tensor:
        """Return the whitened embeddings of all teachers as (batch, sum of dims) float32 of unit length."""
        return torch.cat([part(x) for part in self.parts], dim=1) / len(self.parts) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Map preprocessed (batch, 3, size, size) to L2-normalised (batch, embedding_dim) float32."""
        joined = self.concatenate(x)
        return joined if self.reduction is None else project(joined, self.reduction)


def shared_preprocess(preprocesses: Sequence[tuple[str, Preprocess]]) -> Preprocess:
    """Return the preprocessing of a fused teacher: that of the named teacher with the largest images.

    Raises:
        UserError: The teachers differ in resize mode, crop or interpolation, which no network can convert.
    """
    first_name, first = preprocesses[0]
    for name, other in preprocesses[1:]:
        for key in _SHARED:
            expected, value = getattr(first, key), getattr(other, key)
            if value != expected:
                problem = f"preprocessing '{key}' is {value}, that of {first_name} is {expected}"
                raise UserError(f"{name}: {problem}. Train both teachers with the same.")
    return max((preprocess for _, preprocess in preprocesses), key=lambda preprocess: preprocess.size)


def fit_whitening(vectors: NDArray[np.float32], shrinkage: float, name: str = "models") -> tuple[Tensor, Tensor]:
    """Fit the whitening of (n, D) embeddings in float64: the (D,) mean and the symmetric (D, D) matrix, float32.

    The matrix is the inverse square root of (1 - s) C + s tr(C) / D I, with the covariance C and the shrinkage s
    (Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004, with fixed s). The
    shrinkage limits how much noise the directions of least variance gain.

    Raises:
        UserError: Embeddings are not finite, or all are equal; the message starts with ``name``.
    """
    if not np.isfinite(vectors).all():
        raise UserError(f"{name}: the teacher returns embeddings that are not finite. Train it again.")
    data = vectors.astype(np.float64)
    mean = data.mean(axis=0)
    covariance = (data - mean).T @ (data - mean) / len(data)
    variance = np.trace(covariance) / len(covariance)
    if not variance > 1e-12:
        raise UserError(f"{name}: the teacher returns the same embedding for every image. Check its training.")
    shrunk = (1 - shrinkage) * covariance + shrinkage * variance * np.eye(len(covariance))
    values, directions = np.linalg.eigh(shrunk)
    matrix = directions / np.sqrt(values) @ directions.T
    return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(matrix.astype(np.float32))
