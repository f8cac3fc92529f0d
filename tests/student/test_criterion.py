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

from student.config import FROM_TEACHER, LossConfig, StudentConfig
from student.criterion import DistillationLoss, Labels, class_means
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


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def labels() -> Labels:
    return Labels(catalog(["a", "b", "a", "c", "b", "a"], unlabelled=2))


def test_images_without_labels_have_none(labels: Labels) -> None:
    assert labels.of_rows.tolist() == [0, 1, 0, 2, 1, 0, -1, -1]
    assert labels.counts.tolist() == [3, 2, 1]


@pytest.mark.parametrize("name", FROM_TEACHER[:-1])
def test_every_loss_is_one_line_and_logged_by_its_name(name: str, labels: Labels) -> None:
    config = replace(LossConfig(), **{**dict.fromkeys(("cosine", "similarity_kl"), 0.0), name: 3.0})
    student, teacher = unit(6, 16), unit(6, 16, seed=1)
    objective = DistillationLoss(config, Student(SHAPE), labels, 16)
    found = objective(student, teacher, unit(20, 16, seed=2), torch.arange(6), 0.0, 0)
    assert set(found) == {name}
    assert float(objective.total(found)) == pytest.approx(3 * float(found[name]))


def test_the_total_is_the_weighted_sum(labels: Labels) -> None:
    config = LossConfig(cosine=0.5, similarity_kl=2.0, rkd_distance=0.25, temperature=0.1)
    student, teacher, bank = unit(6, 16), unit(6, 16, seed=1), unit(20, 16, seed=2)
    objective = DistillationLoss(config, Student(SHAPE), labels, 16)
    found = objective(student, teacher, bank, torch.arange(6), 0.0, 0)
    expected = (
        0.5 * cosine_loss(student, teacher)
        + 2 * similarity_kl(student, teacher, bank, 0.1)
        + 0.25 * rkd_distance(student, teacher)
    )
    torch.testing.assert_close(objective.total(found), expected)


def test_the_margin_sees_labelled_images_alone(labels: Labels) -> None:
    config = replace(NONE, margin=1.0)
    objective = DistillationLoss(config, Student(SHAPE), labels, 16)
    mixed = objective(unit(8, 16), unit(8, 16), None, torch.arange(8), 0.5, 0)["margin"]
    alone = objective(unit(8, 16)[:6], unit(8, 16)[:6], None, torch.arange(6), 0.5, 0)["margin"]
    torch.testing.assert_close(mixed, alone)
    none = objective(unit(2, 16), unit(2, 16), None, torch.tensor([6, 7]), 0.5, 0)["margin"]
    assert float(none.detach()) == 0
    none.backward()  # the head is part of the graph all the same
    assert objective.head is not None
    assert objective.head.weight.grad is not None


def test_a_projector_meets_the_teacher_s_dimension(labels: Labels) -> None:
    objective = DistillationLoss(LossConfig(similarity_kl=0.0), Student(SHAPE), labels, 40)
    assert objective.project is not None
    student, teacher = unit(6, 16), unit(6, 40, seed=1)
    found = objective(student, teacher, None, torch.arange(6), 0.0, 0)["cosine"]
    expected = cosine_loss(F.normalize(student @ objective.project.weight.T, dim=1), teacher)
    torch.testing.assert_close(found, expected)


def test_logits_are_the_published_wrapper_s(labels: Labels) -> None:
    """The same parts in vit-pytorch's own network and attention, with a teacher that is a real network."""
    torch.manual_seed(0)
    student, classes = Student(SHAPE), unit(3, 16, seed=4)
    config = LossConfig(cosine=0.0, similarity_kl=0.0, logits=1.0, logits_alpha=0.3, logits_temperature=2.0)
    objective = DistillationLoss(config, student, labels, 16, classes)
    ours = objective.logits
    assert ours is not None
    published = DistillableViT(
        image_size=32, patch_size=8, num_classes=3, dim=48, depth=2, heads=2, mlp_dim=64, dim_head=24, pool="mean"
    )
    published.mlp_head = nn.Sequential(nn.Linear(48, 16), nn.Linear(16, 3))
    published.load_state_dict(ours.wrapper.student.state_dict())
    x, seen = torch.randn(4, 3, 32, 32), unit(4, 16, seed=5)

    class Teacher(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            assert pixels is x
            return 16.0 * seen @ classes.T

    wrapper = DistillWrapper(teacher=Teacher(), student=published, temperature=2.0, alpha=0.3)
    wrapper.distillation_token = ours.wrapper.distillation_token
    wrapper.distill_mlp = ours.wrapper.distill_mlp
    truth = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(ours(x, truth, seen), wrapper(x, truth), atol=1e-5, rtol=1e-5)


def test_logits_train_the_student_s_own_parts(labels: Labels) -> None:
    student = Student(SHAPE)
    config = LossConfig(cosine=0.0, similarity_kl=0.0, logits=1.0)
    objective = DistillationLoss(config, student, labels, 16, unit(3, 16))
    assert objective.logits is not None
    objective.logits(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), unit(4, 16)).backward()
    missing = [name for name, value in student.named_parameters() if value.grad is None]
    assert missing == []


def test_class_means_are_numpy_s(labels: Labels) -> None:
    vectors = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    expected = np.stack([vectors[[0, 2, 5]].mean(0), vectors[[1, 4]].mean(0), vectors[[3]].mean(0)])
    np.testing.assert_allclose(class_means(vectors, labels).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cosine": 0.0, "similarity_kl": 0.0}, "all weights are 0"),
        ({"cosine": -1.0}, r"losses\.cosine: -1\.0"),
        ({"rkd_angle": float("nan")}, r"losses\.rkd_angle: nan"),
        ({"temperature": 0.0}, r"losses\.temperature: 0\.0: give 0\.001 to 100"),
        ({"logits": 1.0}, r"losses\.logits: a baseline that goes with no other"),
        ({"logits_alpha": 1.5}, r"losses\.logits_alpha: 1\.5: give a share"),
    ],
)
def test_wrong_weights_are_refused_by_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LossConfig(**values)


def test_labels_of_one_product_are_refused() -> None:
    with pytest.raises(UserError, match="labels of at least two products"):
        DistillationLoss(replace(NONE, margin=1.0), Student(SHAPE), Labels(catalog(["a", "a"])), 16)


def test_logits_of_another_family_are_refused(labels: Labels) -> None:
    config = LossConfig(cosine=0.0, similarity_kl=0.0, logits=1.0)
    with pytest.raises(UserError, match=r"set model\.family to vit"):
        DistillationLoss(config, Student(replace(SHAPE, family="small-data")), labels, 16, unit(3, 16))
