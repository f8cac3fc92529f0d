from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vit_pytorch.distill import DistillableViT, DistillWrapper

from student.config import LossConfig, StudentConfig
from student.criterion import DistillationLoss, Labels, compute_class_means
from student.loss_config import TEACHER_LOSSES
from student.losses import cosine_loss, rkd_distance, similarity_kl
from student.model import Student
from teacher.config import HeadConfig
from teacher.head import MarginHead
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.readers import UNLABELLED

SHAPE = StudentConfig(image_size=32, dim=48, depth=2, heads=2, dim_head=24, mlp_dim=64, embedding_dim=16)
NONE = LossConfig(cosine=1e-9, similarity_kl=0.0, contrastive=0.0)


def catalog(products: list[str], unlabelled: int = 0) -> Catalog:
    rows = [{"image": f"{n}.jpg", "product": name, "split": "train"} for n, name in enumerate(products)]
    rows += [
        {"image": f"u{n}.jpg", "product": f"u{n}", "split": "train", "source": UNLABELLED} for n in range(unlabelled)
    ]
    return Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), Path())


def unit_vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def labels() -> Labels:
    return Labels(catalog(["a", "b", "a", "c", "b", "a"], unlabelled=2))


def test_unlabelled_images_have_no_product(labels: Labels) -> None:
    assert labels.by_row.tolist() == [0, 1, 0, 2, 1, 0, -1, -1]
    assert labels.counts.tolist() == [3, 2, 1]


@pytest.mark.parametrize("name", TEACHER_LOSSES[:-1])
def test_each_loss_is_returned_by_its_name(name: str, labels: Labels) -> None:
    config = replace(LossConfig(), **{**dict.fromkeys(("cosine", "similarity_kl", "contrastive"), 0.0), name: 3.0})
    student, teacher = unit_vectors(6, 16), unit_vectors(6, 16, seed=1)
    criterion = DistillationLoss(config, Student(SHAPE), labels, 16)
    losses = criterion(student, teacher, unit_vectors(20, 16, seed=2), torch.arange(6), 0.0, 0)
    assert set(losses) == {name}
    assert float(criterion.total(losses)) == pytest.approx(3 * float(losses[name]))


def test_total_is_the_weighted_sum(labels: Labels) -> None:
    config = LossConfig(cosine=0.5, similarity_kl=2.0, contrastive=0.0, rkd_distance=0.25, temperature=0.1)
    student, teacher, bank = unit_vectors(6, 16), unit_vectors(6, 16, seed=1), unit_vectors(20, 16, seed=2)
    criterion = DistillationLoss(config, Student(SHAPE), labels, 16)
    losses = criterion(student, teacher, bank, torch.arange(6), 0.0, 0)
    expected = (
        0.5 * cosine_loss(student, teacher)
        + 2 * similarity_kl(student, teacher, bank, 0.1)
        + 0.25 * rkd_distance(student, teacher)
    )
    torch.testing.assert_close(criterion.total(losses), expected)


def test_margin_ignores_unlabelled_images(labels: Labels) -> None:
    config = replace(NONE, margin=1.0)
    criterion = DistillationLoss(config, Student(SHAPE), labels, 16)
    with_unlabelled = criterion(unit_vectors(8, 16), unit_vectors(8, 16), None, torch.arange(8), 0.5, 0)["margin"]
    labelled = criterion(unit_vectors(8, 16)[:6], unit_vectors(8, 16)[:6], None, torch.arange(6), 0.5, 0)["margin"]
    torch.testing.assert_close(with_unlabelled, labelled)
    unlabelled = criterion(unit_vectors(2, 16), unit_vectors(2, 16), None, torch.tensor([6, 7]), 0.5, 0)["margin"]
    assert float(unlabelled.detach()) == 0
    unlabelled.backward()  # DDP needs the head in every graph.
    assert criterion.head is not None
    assert criterion.head.weight.grad is not None


def test_projector_reaches_the_teacher_width(labels: Labels) -> None:
    criterion = DistillationLoss(LossConfig(similarity_kl=0.0, contrastive=0.0), Student(SHAPE), labels, 40)
    assert criterion.project is not None
    student, teacher = unit_vectors(6, 16), unit_vectors(6, 40, seed=1)
    losses = criterion(student, teacher, None, torch.arange(6), 0.0, 0)["cosine"]
    expected = cosine_loss(F.normalize(student @ criterion.project.weight.T, dim=1), teacher)
    torch.testing.assert_close(losses, expected)


def test_logits_equal_the_published_wrapper(labels: Labels) -> None:
    """Compare with the same layers in vit-pytorch's network and a teacher that is a network."""
    torch.manual_seed(0)
    student, classes = Student(SHAPE), unit_vectors(3, 16, seed=4)
    config = LossConfig(
        cosine=0.0, similarity_kl=0.0, contrastive=0.0, logits=1.0, logits_alpha=0.3, logits_temperature=2.0
    )
    criterion = DistillationLoss(config, student, labels, 16)
    logits = criterion.logits
    assert logits is not None
    logits.set_classes(classes)
    published = DistillableViT(
        image_size=32, patch_size=8, num_classes=3, dim=48, depth=2, heads=2, mlp_dim=64, dim_head=24, pool="mean"
    )
    published.mlp_head = nn.Sequential(nn.Linear(48, 16), nn.Linear(16, 3))
    published.load_state_dict(logits.wrapper.student.state_dict())
    x, embeddings = torch.randn(4, 3, 32, 32), unit_vectors(4, 16, seed=5)

    class Teacher(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            assert pixels is x
            return 16.0 * embeddings @ classes.T

    wrapper = DistillWrapper(teacher=Teacher(), student=published, temperature=2.0, alpha=0.3)
    wrapper.distillation_token = logits.wrapper.distillation_token
    wrapper.distill_mlp = logits.wrapper.distill_mlp
    products = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(logits(x, products, embeddings), wrapper(x, products), atol=1e-5, rtol=1e-5)


def test_logits_train_all_layers_of_the_student(labels: Labels) -> None:
    student = Student(SHAPE)
    config = LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, logits=1.0)
    criterion = DistillationLoss(config, student, labels, 16)
    assert criterion.logits is not None
    criterion.logits(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), unit_vectors(4, 16)).backward()
    missing = [name for name, value in student.named_parameters() if value.grad is None]
    assert missing == []


def test_class_means_equal_numpy(labels: Labels) -> None:
    vectors = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    expected = np.stack([vectors[[0, 2, 5]].mean(0), vectors[[1, 4]].mean(0), vectors[[3]].mean(0)])
    np.testing.assert_allclose(compute_class_means(vectors, labels).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cosine": 0.0, "similarity_kl": 0.0, "contrastive": 0.0}, "all weights are 0"),
        ({"cosine": -1.0}, r"losses\.cosine: expected 0 or more, got -1\.0"),
        ({"rkd_angle": float("nan")}, r"losses\.rkd_angle: expected 0 or more, got nan"),
        ({"temperature": 0.0}, r"losses\.temperature: expected 0\.001 to 100, got 0\.0"),
        (
            {"logits": 1.0},
            r"losses\.logits: this baseline excludes other losses\. Set these to 0: cosine, similarity_kl, contrastive",
        ),
        ({"logits_alpha": 1.5}, r"losses\.logits_alpha: expected 0 to 1, got 1\.5"),
    ],
)
def test_wrong_weights_are_rejected_by_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LossConfig(**values)


def test_labels_of_one_product_are_rejected() -> None:
    with pytest.raises(UserError, match="at least two labelled products"):
        DistillationLoss(replace(NONE, margin=1.0), Student(SHAPE), Labels(catalog(["a", "a"])), 16)


def test_logits_of_another_family_are_rejected(labels: Labels) -> None:
    config = LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, logits=1.0)
    with pytest.raises(UserError, match=r"Set model\.family to vit"):
        DistillationLoss(config, Student(replace(SHAPE, family="small-data")), labels, 16)


def cut(vectors: torch.Tensor, dim: int) -> np.ndarray:
    values = vectors.double().numpy()[:, :dim]
    return values / np.sqrt(np.square(values).sum(axis=1, keepdims=True))


def softened_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """Return the mean KL divergence of (n, m) similarities, by a loop in float64."""
    total = 0.0
    for ours, theirs in zip(student / temperature, teacher / temperature, strict=True):
        p, q = np.exp(theirs) / np.exp(theirs).sum(), np.exp(ours) / np.exp(ours).sum()
        total += sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(student)


def test_prefix_losses_equal_float64_loops(labels: Labels) -> None:
    config = LossConfig(affinity=1.0, mse=0.5, contrastive=0.1, nested=(4, 8), nested_weights=(0.5, 3.0))
    student, teacher, bank = unit_vectors(6, 16), unit_vectors(6, 16, seed=1), unit_vectors(20, 16, seed=2)
    named = DistillationLoss(config, Student(SHAPE), labels, 16)(student, teacher, bank, torch.arange(6), 0.0, 0)
    others = ~np.eye(6, dtype=bool)
    for dim in (4, 8):
        s, t, b = (cut(vectors, dim) for vectors in (student, teacher, bank))
        full, full_bank = teacher.double().numpy(), bank.double().numpy()
        cosines = [float(s[i] @ t[i]) for i in range(6)]
        logits = s @ t.T / config.contrastive_temperature
        own, theirs = (v @ v.T for v in (s, full))
        expected = {
            "cosine": 1 - np.mean(cosines),
            "mse": 2 - 2 * np.mean(cosines),
            "similarity_kl": softened_kl(s @ b.T, full @ full_bank.T, config.temperature),
            "affinity": softened_kl(own[others].reshape(6, 5), theirs[others].reshape(6, 5), config.temperature),
            "contrastive": np.mean([np.log(np.exp(logits[i]).sum()) - logits[i, i] for i in range(6)]),
        }
        for name, value in expected.items():
            assert float(named[f"{name}_{dim}"]) == pytest.approx(float(value), rel=2e-4), name


def test_total_weights_each_prefix(labels: Labels) -> None:
    config = LossConfig(
        cosine=2.0, similarity_kl=0.0, contrastive=0.0, rkd_angle=0.5, nested=(4, 8), nested_weights=(0.5, 3.0)
    )
    student, teacher = unit_vectors(6, 16), unit_vectors(6, 16, seed=1)
    criterion = DistillationLoss(config, Student(SHAPE), labels, 16)
    named = criterion(student, teacher, None, torch.arange(6), 0.0, 0)
    expected = 0.0
    for suffix, factor in (("", 1.0), ("_4", 0.5), ("_8", 3.0)):
        expected += factor * float(2 * named[f"cosine{suffix}"] + 0.5 * named[f"rkd_angle{suffix}"])
    assert len(named) == 6
    assert float(criterion.total(named)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [*TEACHER_LOSSES[:-1], "margin"])
def test_prefixes_of_weight_zero_change_nothing(name: str, labels: Labels) -> None:
    off = dict.fromkeys(("cosine", "similarity_kl", "contrastive"), 0.0)
    plain = LossConfig(**{**off, name: 1.0})
    nested = replace(plain, nested=(4, 8), nested_weights=(0.0, 0.0))
    results = []
    for config in (plain, nested):
        torch.manual_seed(0)
        student = unit_vectors(6, 16).requires_grad_()
        criterion = DistillationLoss(config, Student(SHAPE), labels, 16)
        named = criterion(student, unit_vectors(6, 16, seed=1), unit_vectors(9, 16), torch.arange(6), 0.5, 0)
        total = criterion.total(named)
        results.append((total, *torch.autograd.grad(total, student)))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", [*TEACHER_LOSSES[:-1], "margin"])
def test_loss_of_a_prefix_has_gradients_in_its_dimensions_only(name: str, labels: Labels) -> None:
    config = LossConfig(**{**dict.fromkeys(("cosine", "similarity_kl", "contrastive"), 0.0), name: 1.0, "nested": (4,)})
    student = unit_vectors(6, 16).requires_grad_()
    criterion = DistillationLoss(config, Student(SHAPE), labels, 16)
    named = criterion(student, unit_vectors(6, 16, seed=1), unit_vectors(9, 16), torch.arange(6), 0.5, 0)
    (gradient,) = torch.autograd.grad(named[f"{name}_4"], student)
    assert bool((gradient[:, :4].abs().sum(dim=0) > 0).all())
    assert not gradient[:, 4:].any()


def test_margin_of_a_prefix_is_that_of_a_narrow_head(labels: Labels) -> None:
    criterion = DistillationLoss(replace(NONE, margin=1.0, nested=(4,)), Student(SHAPE), labels, 16)
    assert criterion.head is not None
    narrow = MarginHead(4, torch.from_numpy(labels.counts), NONE.head)
    narrow.weight.data = criterion.head.weight.data[:, :4].clone()
    student = unit_vectors(6, 16)
    named = criterion(student, None, None, torch.arange(6), 0.5, 0)
    expected = narrow(F.normalize(student[:, :4], dim=1), labels.by_row[:6], 0.5, 0)
    torch.testing.assert_close(named["margin_4"], expected)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"nested": (8, 4)}, r"losses\.nested: .* ascending order, got 8 4\."),
        ({"nested": (4, 4)}, r"losses\.nested: .* ascending order, got 4 4\."),
        ({"nested": (0, 4)}, r"losses\.nested: .* from 1 to 8192 .*, got 0 4\."),
        ({"nested": tuple(range(1, 18))}, r"losses\.nested: expected at most 16 numbers, got 17\."),
        ({"nested": (4, 8), "nested_weights": (1.0,)}, r"losses\.nested_weights: .* each of the 2 prefixes, got 1\."),
        ({"nested": (4,), "nested_weights": (-1.0,)}, r"losses\.nested_weights: expected 0 or more each, got -1\."),
        ({"nested": (4,), "nested_weights": (float("nan"),)}, r"losses\.nested_weights: expected 0 or more"),
        (
            {"nested": (4,), "cosine": 0.0, "similarity_kl": 0.0, "contrastive": 0.0, "logits": 1.0},
            r"losses\.nested: the baseline logits",
        ),
        ({"head": HeadConfig(nested=(4,))}, r"losses\.head\.nested: .* follows losses\.nested"),
    ],
)
def test_wrong_prefixes_are_rejected(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        LossConfig(**values)
