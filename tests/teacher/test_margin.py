from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.margin import (
    arcface_logits,
    class_weights,
    cosface_logits,
    growing_margin,
    margin_loss,
    margins_by_count,
    nearest_centre,
    stepped_margin,
)


@pytest.mark.parametrize("cosine", [-1.0, -1.0 - 1e-6, 0.0, 1.0, 1.0 + 1e-6])
@pytest.mark.parametrize("margin", [0.0, 0.5, math.pi / 2])
@pytest.mark.parametrize("logits_of", [arcface_logits, cosface_logits])
def test_gradients_are_finite_at_angle_0_and_pi(cosine: float, margin: float, logits_of) -> None:  # type: ignore[no-untyped-def]
    values = torch.full((1, 3), cosine, requires_grad=True)
    logits = logits_of(values, torch.tensor([1]), margin, 30.0)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logits_of", [arcface_logits, cosface_logits])
def test_16_bit_cosines_are_computed_in_float32(logits_of, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    cosine = torch.linspace(-1, 1, 12).reshape(4, 3).to(dtype)
    labels = torch.tensor([0, 1, 2, 0])
    logits = logits_of(cosine, labels, 0.3, 30.0)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits_of(cosine.float(), labels, 0.3, 30.0))


@settings(deadline=None)  # the first comparison in a process imports much of torch
@given(st.floats(0, math.pi / 2), st.floats(0.5, 64))
def test_target_logit_falls_with_the_angle(margin: float, scale: float) -> None:
    angles = torch.linspace(0, math.pi, 400, dtype=torch.float64)
    logits = arcface_logits(torch.cos(angles)[:, None], torch.zeros(400, dtype=torch.int64), margin, scale)[:, 0]
    assert (logits.diff() <= 1e-9 * scale).all()
    inside = (angles < math.pi - margin) & (angles > 0.01)
    torch.testing.assert_close(logits[inside], scale * torch.cos(angles + margin)[inside], atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("logits_of", [arcface_logits, cosface_logits])
@pytest.mark.parametrize("margin", [0.0, 0.3, math.pi / 2])
def test_gradients_equal_finite_differences(logits_of, margin: float) -> None:  # type: ignore[no-untyped-def]
    cosine = torch.linspace(-0.99, 0.99, 18, dtype=torch.float64).reshape(6, 3).requires_grad_()
    labels, weights = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0.5, 2.0, 1.0])

    def loss(values: torch.Tensor) -> torch.Tensor:
        return margin_loss(logits_of(values, labels, margin, 8.0), labels, 0.1, weights)

    assert torch.autograd.gradcheck(loss, cosine)


@pytest.mark.parametrize("logits_of", [arcface_logits, cosface_logits])
def test_margin_per_image_affects_only_that_image(logits_of) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    cosine = torch.rand(4, 6, generator=generator) * 2 - 1
    labels = torch.tensor([0, 2, 4, 5])
    margins = torch.tensor([0.0, 0.1, 0.3, 0.5])
    together = logits_of(cosine, labels, margins, 10.0)
    for row in range(4):
        alone = logits_of(cosine[row : row + 1], labels[row : row + 1], float(margins[row]), 10.0)
        torch.testing.assert_close(together[row], alone[0])
    changed = (together - 10 * cosine).abs() > 1e-4
    assert torch.equal(changed, F.one_hot(labels, 6).bool() & (margins > 0)[:, None])


def test_nearest_centre_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    cosine = torch.rand(5, 4 * 3, generator=generator)
    expected = [[max(row[3 * c : 3 * c + 3]) for c in range(4)] for row in cosine.tolist()]
    assert nearest_centre(cosine, 3).tolist() == expected
    assert nearest_centre(cosine, 1) is cosine


def test_margins_by_count_equal_a_loop() -> None:
    counts = [3, 3, 20, 100, 1000]
    rarity = [n**-0.25 for n in counts]
    expected = [0.05 + 0.45 * (r - min(rarity)) / (max(rarity) - min(rarity)) for r in rarity]
    margins = margins_by_count(torch.tensor(counts), 0.05, 0.5)
    assert margins.tolist() == pytest.approx(expected)
    assert margins[0] == margins[1] == 0.5
    assert margins[-1] == 0.05
    assert margins_by_count(torch.tensor([7, 7]), 0.05, 0.5).tolist() == [0.5, 0.5]


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.floats(0, 1))
def test_class_weights_have_mean_one_over_images(counts: list[int], power: float) -> None:
    weights = class_weights(torch.tensor(counts), power).numpy()
    assert np.average(weights, weights=counts) == pytest.approx(1)
    for weight, count in zip(weights, counts, strict=True):
        assert weight * count**power == pytest.approx(weights[0] * counts[0] ** power)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_equals_a_float64_loop(smoothing: float, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(7, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 3, 3, 0])
    weights = torch.tensor([0.5, 2.0, 1.0, 0.7]) if weighted else None
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        norm = math.log(sum(math.exp(value) for value in row))
        share = [smoothing / 4 + (1 - smoothing) * (c == label) for c in range(4)]
        loss = sum(s * (norm - value) for s, value in zip(share, row, strict=True))
        total += loss * (float(weights[label]) if weights is not None else 1.0)
    assert margin_loss(logits, labels, smoothing, weights).item() == pytest.approx(total / 7)


def test_margins_grow_linearly_or_by_epoch() -> None:
    assert [growing_margin(p, 0.1, 0.5) for p in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.1, 0.3, 0.5, 0.5])
    assert [stepped_margin(e, 0.3, 0.1, 0.8) for e in range(7)] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8])
