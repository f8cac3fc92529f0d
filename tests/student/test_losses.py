from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from student.losses import cosine_loss, similarity_kl


def _vectors(n: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, 12, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_cosine_loss_is_half_the_squared_distance() -> None:
    student, teacher = _vectors(20, 0), _vectors(20, 1)
    expected = (student.double() - teacher.double()).square().sum(dim=1).mean() / 2
    assert cosine_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_similarity_kl_equals_a_float64_loop() -> None:
    student, teacher, bank, t = _vectors(6, 0), _vectors(6, 1), _vectors(30, 2), 0.07
    total = 0.0
    for s, e in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        p = np.exp(bank.double().numpy() @ e / t)
        q = np.exp(bank.double().numpy() @ s / t)
        p, q = p / p.sum(), q / q.sum()
        total += sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    assert similarity_kl(student, teacher, bank, t).item() == pytest.approx(total / 6, rel=1e-4)


def test_both_vanish_only_at_the_teacher() -> None:
    teacher, bank = _vectors(8, 0), _vectors(40, 1)
    assert cosine_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert similarity_kl(teacher, teacher, bank, 0.05).item() == pytest.approx(0, abs=1e-5)
    assert similarity_kl(_vectors(8, 5), teacher, bank, 0.05).item() > 0.1
