from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from student.losses import (
    affinity_loss,
    align_tokens,
    common_grid,
    cosine_loss,
    interactive_contrastive,
    mse_loss,
    rkd_angle,
    rkd_distance,
    similarity_kl,
    token_feature,
    token_similarity,
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


def _tokens(seed: int, width: int = 6, count: int = 5) -> Tensor:
    """Return (3, count, width) tokens of other lengths than 1."""
    return 2 * torch.randn(3, count, width, generator=torch.Generator().manual_seed(seed)) + 2


def _token_similarity(student: np.ndarray, teacher: np.ndarray) -> float:
    total = 0.0
    for images in zip(student, teacher, strict=True):
        s, t = ([token / np.sqrt((token**2).sum()) for token in tokens] for tokens in images)
        for i in range(len(s)):
            total += _kl(_softmax([t[i] @ other for other in t]), _softmax([s[i] @ other for other in s]))
    return total / (student.shape[0] * student.shape[1])


def _token_feature(student: np.ndarray, teacher: np.ndarray) -> float:
    cosines, hubers = [], []
    for image in range(len(student)):
        for a, b in zip(student[image], teacher[image], strict=True):
            cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
            hubers += [_huber(x, y) for x, y in zip(a, b, strict=True)]
    return 0.9 * (1 - float(np.mean(cosines))) + 0.1 * float(np.mean(hubers))


def test_token_similarity_equals_a_float64_loop() -> None:
    """Widths may differ."""
    student, teacher = _tokens(0, width=4), _tokens(1, width=7)
    expected = _token_similarity(student.double().numpy(), teacher.double().numpy())
    assert expected > 0.1
    assert token_similarity(student, teacher, T).item() == pytest.approx(expected, rel=2e-4)


def test_token_feature_equals_a_float64_loop() -> None:
    student, teacher = _tokens(0), _tokens(1)
    expected = _token_feature(student.double().numpy(), teacher.double().numpy())
    assert token_feature(student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [lambda s, t: token_similarity(s, t, T), token_feature], ids=["similarity", "feature"])
def test_token_losses_are_smallest_at_the_teacher(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    teacher = _tokens(0)
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    for seed in range(1, 6):
        assert loss(teacher + 0.3 * _tokens(seed), teacher).item() > 1e-4
    student = _tokens(1, width=6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.double()), student)


def test_token_similarity_ignores_rotation_and_length() -> None:
    teacher = _tokens(0)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0]
    lengths = torch.rand(3, 5, 1, generator=torch.Generator().manual_seed(4)) + 0.5
    assert token_similarity(teacher @ rotation * lengths, teacher, T).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((14, 14), (16, 16), (16, 16)),
        ((14, 14), (7, 7), (7, 7)),
        ((8, 8), (16, 16), (16, 16)),  # 4 times as many
        ((7, 7), (16, 16), (7, 7)),
        ((4, 4), (4, 4), (4, 4)),
    ],
)
def test_common_grid_is_the_teachers_unless_it_is_far_finer(
    student: tuple[int, int], teacher: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert common_grid(student, teacher) == expected


def _map(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("own", "grid"), [((4, 4), (6, 6)), ((5, 4), (3, 2))])
def test_student_tokens_are_resampled_as_a_float64_loop_does(own: tuple[int, int], grid: tuple[int, int]) -> None:
    student, teacher = _map(*own, seed=0), _map(*grid, seed=1)
    resampled, kept = align_tokens(student, teacher)
    assert torch.equal(kept, teacher.permute(0, 2, 3, 1).reshape(2, grid[0] * grid[1], 3))
    values = student.double().numpy()

    def neighbours(index: int, before: int, after: int) -> tuple[int, int, float]:
        place = max(0.0, (index + 0.5) * before / after - 0.5)  # the centres of the tokens cover the same image
        low = int(place)
        return low, min(low + 1, before - 1), place - low

    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        (top, bottom, down), (left, right, along) = (
            neighbours(index, before, after) for index, before, after in zip((row, column), own, grid, strict=True)
        )
        upper = values[:, :, top, left] * (1 - along) + values[:, :, top, right] * along
        lower = values[:, :, bottom, left] * (1 - along) + values[:, :, bottom, right] * along
        expected = upper * (1 - down) + lower * down
        np.testing.assert_allclose(resampled[:, row * grid[1] + column].numpy(), expected, atol=1e-6)


def test_far_finer_tokens_of_the_teacher_are_resampled_as_pillow_does() -> None:
    student, teacher = _map(3, 3, seed=0), _map(8, 8, seed=1)
    kept, resampled = align_tokens(student, teacher)
    assert torch.equal(kept, student.permute(0, 2, 3, 1).reshape(2, 9, 3))
    for image, channel in itertools.product(range(2), range(3)):
        expected = Image.fromarray(teacher[image, channel].numpy()).resize((3, 3), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(resampled[image, :, channel].numpy(), np.asarray(expected).ravel(), atol=1e-5)
