from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss, SubCenterArcFaceLoss
from torch import Tensor

from teacher.config import HeadConfig
from teacher.head import MarginHead
from tests.teacher.saved_tensors import saved_storages
from vpr.common.errors import UserError


def make_batch(dim: int = 16, classes: int = 10, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(size, dim, generator=generator)).requires_grad_()
    return embeddings, torch.randint(0, classes, (size,), generator=generator)


def make_head(classes: int = 10, dim: int = 16, **changes: object) -> MarginHead:
    torch.manual_seed(0)
    margin = changes.get("margin", 0.3)
    counts = torch.arange(1, classes + 1)
    return MarginHead(dim, counts, HeadConfig(**{"scale": 16.0, "margin_end": margin, **changes}))  # type: ignore[arg-type]


def assert_equal_loss(
    loss: Tensor, expected: Tensor, embeddings: Tensor, weight: Tensor, expected_weight: Tensor
) -> None:
    """Compare losses and gradients.

    The reference normalises the embeddings again, so its gradient has no radial component.
    """
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grad_e, grad_w = torch.autograd.grad(loss, (embeddings, weight))
    expected_e, expected_w = torch.autograd.grad(expected, (embeddings, expected_weight))
    torch.testing.assert_close(grad_w, expected_w.T, rtol=1e-3, atol=1e-5)
    radial = (grad_e * embeddings).sum(dim=1, keepdim=True) * embeddings
    torch.testing.assert_close(grad_e - radial, expected_e, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5, 0.8])
def test_arcface_equals_pytorch_metric_learning(margin: float) -> None:
    embeddings, labels = make_batch()
    head = make_head(margin=margin)
    reference = ArcFaceLoss(10, 16, margin=math.degrees(margin), scale=16.0)
    reference.W.data = head.weight.data.T.clone()
    loss, expected = head(embeddings, labels, 0, 0), reference(embeddings, labels)
    assert_equal_loss(loss, expected, embeddings, head.weight, reference.W)


@pytest.mark.parametrize("margin", [0.0, 0.35, 0.65])
def test_cosface_equals_pytorch_metric_learning(margin: float) -> None:
    embeddings, labels = make_batch()
    head = make_head(loss="cosface", margin=margin)
    reference = CosFaceLoss(10, 16, margin=margin, scale=16.0)
    reference.W.data = head.weight.data.T.clone()
    loss, expected = head(embeddings, labels, 0, 0), reference(embeddings, labels)
    assert_equal_loss(loss, expected, embeddings, head.weight, reference.W)


@pytest.mark.parametrize("centres", [1, 2, 3])
def test_sub_centres_equal_pytorch_metric_learning(centres: int) -> None:
    embeddings, labels = make_batch()
    head = make_head(margin=0.3, sub_centres=centres)
    sizes = {"num_classes": 10, "embedding_size": 16, "sub_centers": centres}
    reference = SubCenterArcFaceLoss(margin=math.degrees(0.3), scale=16.0, **sizes)
    reference.W.data = head.weight.data.T.clone()
    loss, expected = head(embeddings, labels, 0, 0), reference(embeddings, labels)
    assert_equal_loss(loss, expected, embeddings, head.weight, reference.W)


def loop_loss(embeddings: Tensor, weight: Tensor, labels: Tensor, config: HeadConfig) -> Tensor:
    """Compute the loss at the initial margin in a float64 loop; class c has c + 1 images."""
    counts = range(1, len(weight) // config.sub_centres + 1)
    rarity = [n**-0.25 for n in counts]
    shares = [
        (r - min(rarity)) / (max(rarity) - min(rarity)) * (1 - config.min_margin_ratio) + config.min_margin_ratio
        for r in rarity
    ]
    weights = [n**-config.class_weight_power for n in counts]
    mean = sum(n * w for n, w in zip(counts, weights, strict=True)) / sum(counts)
    total = torch.zeros((), dtype=torch.float64)
    for embedding, label in zip(embeddings, labels.tolist(), strict=True):
        cosines = [embedding @ direction / direction.norm() for direction in weight]
        nearest = [max(cosines[c * config.sub_centres : (c + 1) * config.sub_centres]) for c in range(len(counts))]
        margin = config.margin * shares[label]
        angle = torch.acos(nearest[label])
        if config.loss == "cosface":
            target = nearest[label] - margin
        elif angle + margin < math.pi:
            target = torch.cos(angle + margin)
        else:
            target = nearest[label] - margin * math.sin(margin)
        logits = [config.scale * (target if c == label else value) for c, value in enumerate(nearest)]
        norm = sum(value.exp() for value in logits).log()
        smooth = sum(norm - value for value in logits) / len(counts)
        loss = (1 - config.label_smoothing) * (norm - logits[label]) + config.label_smoothing * smooth
        total = total + weights[label] / mean * loss
    return total / len(labels)


@pytest.mark.parametrize("kind", ["arcface", "cosface"])
@pytest.mark.parametrize(
    "changes",
    [
        {"min_margin_ratio": 0.25},
        {"label_smoothing": 0.1},
        {"class_weight_power": 0.5},
        {"min_margin_ratio": 0.0, "label_smoothing": 0.2, "class_weight_power": 1.0, "sub_centres": 2},
    ],
)
def test_loss_and_gradients_equal_a_float64_loop(kind: str, changes: dict[str, float]) -> None:
    embeddings, labels = make_batch(dim=6, size=16)
    head = make_head(10, 6, loss=kind, margin=0.6, **changes)
    # The angle of images opposite to their class is beyond pi - m, where ArcFace uses its other formula.
    opposite = -F.normalize(head.weight.detach())[labels[:2] * head.config.sub_centres]
    embeddings = torch.cat([embeddings.detach()[2:], F.normalize(opposite + 0.1)]).requires_grad_()
    labels = labels.roll(-2)
    exact = [tensor.detach().double().requires_grad_() for tensor in (embeddings, head.weight)]
    expected = loop_loss(exact[0], exact[1], labels, head.config)
    loss = head(embeddings, labels, 0, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = zip(torch.autograd.grad(loss, (embeddings, head.weight)), torch.autograd.grad(expected, exact), strict=True)
    for gradient, expected_gradient in pairs:
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centres", [1, 2])
def test_zero_margin_is_cross_entropy_of_cosines(centres: int) -> None:
    embeddings, labels = make_batch()
    head = make_head(margin=0.0, sub_centres=centres)
    logits = head.config.scale * head.cosine(embeddings)
    assert logits.shape == (32, 10)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(head(embeddings, labels, 0, 0).item())


def test_margin_grows_by_progress_or_by_epoch() -> None:
    even = make_head(margin=0.1, margin_end=0.5)
    assert [even.margin(p, 9) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.3, 0.5])
    stepped = make_head(margin=0.3, margin_end=0.8, margin_step=0.05)
    assert [stepped.margin(1.0, e) for e in (0, 1, 10, 11)] == pytest.approx([0.3, 0.35, 0.8, 0.8])


def test_loss_is_float32_under_autocast() -> None:
    embeddings, labels = make_batch()
    head = make_head()
    exact = head(embeddings, labels, 0, 0)
    rounded = embeddings.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(rounded, labels, 0, 0)
        assert torch.equal(head(embeddings, labels, 0, 0), exact)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, head(rounded.float(), labels, 0, 0))
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_gradients_are_finite_at_angle_0_and_pi() -> None:
    head = make_head(margin=0.5)
    embeddings = torch.cat([F.normalize(head.weight.detach()), -F.normalize(head.weight.detach())]).requires_grad_()
    head(embeddings, torch.arange(20) % 10, 0, 0).backward()
    assert embeddings.grad is not None
    assert head.weight.grad is not None
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize("changes", [{}, {"min_margin_ratio": 0.1, "label_smoothing": 0.1, "class_weight_power": 0.5}])
@pytest.mark.parametrize("centres", [1, 3])
def test_head_of_10300_classes_saves_little_memory(centres: int, changes: dict[str, float]) -> None:
    """Autograd saves the normalised weights and two copies of all cosines, for every configuration."""
    classes, dim, size = 10_300, 1024, 128
    head = make_head(classes, dim, sub_centres=centres, margin=0.3, **changes)
    embeddings, labels = make_batch(dim, classes, size)
    with saved_storages() as storages:
        loss = head(embeddings, labels, 0, 0)
    inputs = {head.weight.untyped_storage()._cdata, embeddings.untyped_storage()._cdata}
    saved = sum(storage.nbytes() for key, storage in storages.items() if key not in inputs)
    cosines = 4 * size * classes * centres
    directions = 4 * dim * classes * centres  # the normalised weights
    assert saved <= 2.05 * cosines + 1.01 * directions
    # Weights, gradients, two AdamW states and saved tensors, against 632 M parameters of 16 bytes.
    assert 4 * directions + saved < 0.08 * 632e6 * 16
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": -0.1}, r"head\.margin: expected .+ got margin -0\.1 and"),
        ({"margin": 0.5, "margin_end": 0.4}, r"margin 0\.5 and margin_end 0\.4"),
        ({"margin": 1.0, "margin_end": 1.6}, "<= 1.57"),
        ({"margin": float("nan")}, r"head\.margin: .*nan"),
        ({"sub_centres": 0}, r"head\.sub_centres: expected .+ got 0"),
        ({"scale": 0.0}, r"head\.scale"),
        ({"label_smoothing": 1.5}, r"head\.label_smoothing: expected .+ got 1\.5"),
        ({"margin_step": -1.0}, r"head\.margin_step"),
        ({"min_margin_ratio": 1.1}, r"head\.min_margin_ratio: expected .+ got 1\.1"),
        ({"class_weight_power": -0.5}, r"head\.class_weight_power: expected .+ got -0\.5"),
    ],
)
def test_values_out_of_range_are_rejected(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HeadConfig(**changes)  # type: ignore[arg-type]
