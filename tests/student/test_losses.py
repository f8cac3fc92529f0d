from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from student.losses import (
    affinity_loss,
    cosine_loss,
    interactive_contrastive,
    mse_loss,
    rkd_angle,
    rkd_distance,
    similarity_kl,
)

T = 0.07
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_loss,
    "mse": mse_loss,
    "similarity_kl": lambda s, t: similarity_kl(s, t, _vectors(30, 2).to(s.dtype), T),
    "affinity": lambda s, t: affinity_loss(s, t, T),
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "interactive_contrastive": lambda s, t: interactive_contrastive(s, t, T),
}


def _vectors(n: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, 12, generator=torch.Generator().manual_seed(seed)), dim=1)


def _softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value / T) for value in values]
    return [power / sum(powers) for power in powers]


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def _huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def _cosine(s: list[np.ndarray], t: list[np.ndarray]) -> float:
    return sum(1 - a @ b for a, b in zip(s, t, strict=True)) / len(s)


def _mse(s: list[np.ndarray], t: list[np.ndarray]) -> float:
    return sum(((a - b) ** 2).sum() for a, b in zip(s, t, strict=True)) / len(s)


def _similarity_kl(s: list[np.ndarray], t: list[np.ndarray]) -> float:
    bank = _vectors(30, 2).double().numpy()
    return sum(
        _kl(_softmax([b @ v for v in bank]), _softmax([a @ v for v in bank])) for a, b in zip(s, t, strict=True)
    ) / len(s)


def _affinity(s: list[np.ndarray], t: list[np.ndarray]) -> float:
    total = 0.0
    for i in range(len(s)):
        p, q = (_softmax([v[i] @ v[j] for j in range(len(s)) if j != i]) for v in (t, s))
        total += _kl(p, q)
    return total / len(s)


def _rkd_distance(s: list[np.ndarray], t: list[np.ndarray]) -> float:
    pairs = list(itertools.permutations(range(len(s)), 2))
    lengths = [[float(np.linalg.norm(v[i] - v[j])) for i, j in pairs] for v in (s, t)]
    means = [sum(values) / len(pairs) for values in lengths]
    return sum(_huber(a / means[0], b / means[1]) for a, b in zip(*lengths, strict=True)) / len(pairs)


def _rkd_angle(s: list[np.ndarray], t: list[np.ndarray]) -> float:
    def angle(v: list[np.ndarray], i: int, j: int, k: int) -> float:
        a, b = v[j] - v[i], v[k] - v[i]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    triples = list(itertools.permutations(range(len(s)), 3))
    return sum(_huber(angle(s, *triple), angle(t, *triple)) for triple in triples) / len(s) ** 3


def _contrastive(s: list[np.ndarray], t: list[np.ndarray]) -> float:
    return -sum(math.log(_softmax([s[i] @ v for v in t])[i]) for i in range(len(s))) / len(s)


LOOPS = [_cosine, _mse, _similarity_kl, _affinity, _rkd_distance, _rkd_angle, _contrastive]


@pytest.mark.parametrize(("name", "loop"), zip(LOSSES, LOOPS, strict=True), ids=list(LOSSES))
def test_loss_equals_a_float64_loop(name: str, loop: Callable[..., float]) -> None:
    student, teacher = _vectors(7, 0), _vectors(7, 1)
    expected = loop(list(student.double().numpy()), list(teacher.double().numpy()))
    assert LOSSES[name](student, teacher).item() == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_smallest_at_the_teacher(name: str) -> None:
    teacher = _vectors(8, 0)
    minimum = LOSSES[name](teacher, teacher).item()
    if name != "interactive_contrastive":
        assert minimum == pytest.approx(0, abs=1e-5)
    for seed in range(1, 6):
        assert LOSSES[name](F.normalize(teacher + 0.3 * _vectors(8, seed), dim=1), teacher).item() > minimum


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name: str) -> None:
    student = F.normalize(_vectors(5, 0).double() + 1e-3, dim=1).requires_grad_()
    teacher = _vectors(5, 1).double()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), student)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_for_equal_images(name: str) -> None:
    student = _vectors(1, 0).repeat(4, 1).requires_grad_()
    LOSSES[name](student, _vectors(4, 1)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["affinity", "rkd_distance", "rkd_angle"])
def test_relations_are_invariant_to_rotation(name: str) -> None:
    teacher = _vectors(6, 0)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(3)))[0]
    assert LOSSES[name](teacher @ rotation, teacher).item() == pytest.approx(0, abs=1e-5)


def test_relations_of_one_image_are_rejected() -> None:
    with pytest.raises(ValueError, match="at least two"):
        affinity_loss(_vectors(1, 0), _vectors(1, 1), T)
