from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ArcFaceLoss

from teacher.margin import ArcFaceHead, arcface_logits, growing_margin


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5, 0.8])
def test_loss_and_gradients_equal_pytorch_metric_learning(margin: float) -> None:
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(32, 16), dim=1).requires_grad_()
    labels = torch.randint(0, 10, (32,))
    head = ArcFaceHead(16, 10, scale=16.0)
    reference = ArcFaceLoss(10, 16, margin=math.degrees(margin), scale=16.0)
    reference.W.data = head.weight.data.T.clone()
    ours, theirs = head(embeddings, labels, margin), reference(embeddings, labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    (ours_e, ours_w) = torch.autograd.grad(ours, (embeddings, head.weight))
    (theirs_e, theirs_w) = torch.autograd.grad(theirs, (embeddings, reference.W))
    torch.testing.assert_close(ours_w, theirs_w.T, rtol=1e-3, atol=1e-5)
    # Theirs normalises the embeddings once more, which projects the radial part of the gradient out.
    radial = (ours_e * embeddings).sum(dim=1, keepdim=True) * embeddings
    torch.testing.assert_close(ours_e - radial, theirs_e, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cosine", [-1.0, -1.0 - 1e-6, 0.0, 1.0, 1.0 + 1e-6])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_no_nan_where_the_angle_is_0_or_pi(cosine: float, margin: float) -> None:
    values = torch.full((1, 3), cosine, requires_grad=True)
    logits = arcface_logits(values, torch.tensor([1]), margin, 30.0)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert torch.isfinite(values.grad).all()


def test_the_target_falls_with_the_angle_over_the_whole_half_circle() -> None:
    angles = torch.linspace(0.01, math.pi - 0.01, 500, dtype=torch.float64)
    logits = arcface_logits(torch.cos(angles)[:, None], torch.zeros(500, dtype=torch.int64), 0.5, 1.0)[:, 0]
    assert (logits.diff() < 0).all()
    inside = angles < math.pi - 0.5
    torch.testing.assert_close(logits[inside].double(), torch.cos(angles + 0.5)[inside], atol=1e-6, rtol=0)


def test_other_classes_are_untouched() -> None:
    cosine = torch.rand(4, 6) * 2 - 1
    labels = torch.tensor([0, 2, 4, 5])
    changed = arcface_logits(cosine, labels, 0.3, 10.0) != 10 * cosine
    assert torch.equal(changed, F.one_hot(labels, 6).bool())


def test_margin_grows_from_start_to_end() -> None:
    assert [growing_margin(p, 0.1, 0.5) for p in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.1, 0.3, 0.5, 0.5])
