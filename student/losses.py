"""Distillation losses, as pure functions of embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos(student, teacher); half the squared distance of the unit vectors.

    Args:
        student: (batch, dim) float32, L2-normalised.
        teacher: (batch, dim) float32, L2-normalised, of the same views.
    """
    return (1 - (student * teacher).sum(dim=1)).mean()


def similarity_kl(student: Tensor, teacher: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """KL divergence between softened similarities to a bank of teacher embeddings.

    mean over the batch of KL(softmax(teacher bank^T / T) || softmax(student bank^T / T)): the student
    ranks the bank as the teacher does (Fang et al., "SEED", ICLR 2021, eq. 4-6).

    Args:
        student: (batch, dim) float32, L2-normalised.
        teacher: (batch, dim) float32, L2-normalised, of the same views.
        bank: (size, dim) float32, L2-normalised teacher embeddings of other views.
        temperature: T, of both.
    """
    target = F.log_softmax(teacher @ bank.T / temperature, dim=1)
    return F.kl_div(
        F.log_softmax(student @ bank.T / temperature, dim=1), target, log_target=True, reduction="batchmean"
    )
