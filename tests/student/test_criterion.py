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
from vpr.common.errors import UserError
from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.readers import UNLABELLED

SHAPE = StudentConfig(image_size=32, dim=48, depth=2, heads=2, dim_head=24, mlp_dim=64, embedding_dim=16)
NONE = LossConfig(cosine=1e-9, similarity_kl=0.0)


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
    config = replace(LossConfig(), **{**dict.fromkeys(("cosine", "similarity_kl"), 0.0), name: 3.0})
    student, teacher = unit_vectors(6, 16), unit_vectors(6, 16, seed=1)
    criterion = DistillationLoss(config, Student(SHAPE), labels, 16)
    losses = criterion(student, teacher, unit_vectors(20, 16, seed=2), torch.arange(6), 0.0, 0)
    assert set(losses) == {name}
    assert float(criterion.total(losses)) == pytest.approx(3 * float(losses[name]))


def test_total_is_the_weighted_sum(labels: Labels) -> None:
    config = LossConfig(cosine=0.5, similarity_kl=2.0, rkd_distance=0.25, temperature=0.1)
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
    criterion = DistillationLoss(LossConfig(similarity_kl=0.0), Student(SHAPE), labels, 40)
    assert criterion.project is not None
    student, teacher = unit_vectors(6, 16), unit_vectors(6, 40, seed=1)
    losses = criterion(student, teacher, None, torch.arange(6), 0.0, 0)["cosine"]
    expected = cosine_loss(F.normalize(student @ criterion.project.weight.T, dim=1), teacher)
    torch.testing.assert_close(losses, expected)


def test_logits_equal_the_published_wrapper(labels: Labels) -> None:
    """Compare with the same layers in vit-pytorch's network and a teacher that is a network."""
    torch.manual_seed(0)
    student, classes = Student(SHAPE), unit_vectors(3, 16, seed=4)
    config = LossConfig(cosine=0.0, similarity_kl=0.0, logits=1.0, logits_alpha=0.3, logits_temperature=2.0)
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
    config = LossConfig(cosine=0.0, similarity_kl=0.0, logits=1.0)
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
        ({"cosine": 0.0, "similarity_kl": 0.0}, "all weights are 0"),
        ({"cosine": -1.0}, r"losses\.cosine: expected 0 or more, got -1\.0"),
        ({"rkd_angle": float("nan")}, r"losses\.rkd_angle: expected 0 or more, got nan"),
        ({"temperature": 0.0}, r"losses\.temperature: expected 0\.001 to 100, got 0\.0"),
        ({"logits": 1.0}, r"losses\.logits: this baseline excludes other losses"),
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
    config = LossConfig(cosine=0.0, similarity_kl=0.0, logits=1.0)
    with pytest.raises(UserError, match=r"Set model\.family to vit"):
        DistillationLoss(config, Student(replace(SHAPE, family="small-data")), labels, 16)
