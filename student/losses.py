"""Distillation losses, as pure functions of embeddings.

Embeddings are (batch, dim) float32 of unit length, the student's and the teacher's of the same views, row for row.
Every loss is a mean over the batch, at least 0, and smallest where the student gives what the teacher does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos(student, teacher); half the squared distance of the unit vectors."""
    return (1 - (student * teacher).sum(dim=1)).mean()


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of the unit vectors ("FD" of Yang et al., "CLIP-KD", CVPR 2024).

    Twice the cosine loss for vectors of unit length; it is here under the name by which the literature compares.
    """
    return (student - teacher).square().sum(dim=1).mean()


def similarity_kl(student: Tensor, teacher: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """KL divergence between softened similarities to a bank of teacher embeddings.

    mean over the batch of KL(softmax(teacher bank^T / T) || softmax(student bank^T / T)): the student
    ranks the bank as the teacher does (Fang et al., "SEED", ICLR 2021, eq. 4-6).

    Args:
        student: (batch, dim).
        teacher: (batch, dim).
        bank: (size, dim) teacher embeddings of other views.
        temperature: T, of both.
    """
    return _kl(student @ bank.T / temperature, teacher @ bank.T / temperature)


def affinity_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence between each image's softened similarities to the others of its batch.

    CLIP-KD's contrastive relations ("CRD") within one modality; an image's similarity
    to itself is left out, since it is 1 in both and takes most of the softmax.

    Raises:
        ValueError: a batch of fewer than two images has no relations.
    """
    return _kl(_others(student @ student.T) / temperature, _others(teacher @ teacher.T) / temperature)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between pairwise distances, over its batch's mean (Park et al., "RKD", CVPR 2019, 3.2.1)."""
    return F.smooth_l1_loss(_relative(_distances(student)), _relative(_distances(teacher)))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles that triples of a batch form (RKD, 3.2.2).

    batch^3 values of float32: 64 MiB for 256 images.
    """
    return F.smooth_l1_loss(_angles(student), _angles(teacher))


def interactive_contrastive(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding an image's own teacher embedding among its batch's (CLIP-KD's "ICL").

    -log(exp(s_i t_i / T) / sum_j exp(s_i t_j / T)); its least value is above 0.
    """
    logits = student @ teacher.T / temperature
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    target = F.log_softmax(teacher, dim=1)
    return F.kl_div(F.log_softmax(student, dim=1), target, log_target=True, reduction="batchmean")


def _others(square: Tensor) -> Tensor:
    """(n, n) without its diagonal: (n, n - 1)."""
    n = len(square)
    if n < 2:
        raise ValueError("relations within a batch need at least two images")
    return square.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def _distances(vectors: Tensor) -> Tensor:
    """(n, n - 1) Euclidean distances to the others; the square root is kept from 0, where it has no gradient."""
    squares = (vectors[:, None] - vectors[None]).square().sum(dim=2)
    return _others(squares).clamp_min(1e-12).sqrt()


def _relative(distances: Tensor) -> Tensor:
    return distances / distances.mean()


def _angles(vectors: Tensor) -> Tensor:
    """(n, n, n) cosines of the angles at i between j and k; 0 where two of them are the same image."""
    directions = F.normalize(vectors[None] - vectors[:, None], dim=2, eps=1e-6)
    cosines = directions @ directions.transpose(1, 2)
    return cosines - torch.diag_embed(torch.diagonal(cosines, dim1=1, dim2=2))
