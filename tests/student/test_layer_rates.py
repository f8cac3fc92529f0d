"""Learning rates of a student that fall with the distance from its output."""

from __future__ import annotations

import pytest
import torch

from student.config import DistillConfig, StudentConfig
from student.model import Student
from student.module import group_by_rate
from vpr.common.errors import UserError


@pytest.fixture
def student() -> Student:
    return Student(StudentConfig(image_size=32, patch_size=16, dim=64, depth=3, heads=2, mlp_dim=64, embedding_dim=16))


def factors(student: Student, criterion: torch.nn.Module, decay: float) -> dict[str, float]:
    """Return the factor of each parameter by its name; each parameter is in one group."""
    groups = group_by_rate(student, criterion, decay)
    by_id = {id(parameter): factor for factor, group in groups.items() for parameter in group}
    assert len(by_id) == sum(len(group) for group in groups.values())
    names = [
        *student.named_parameters(),
        *((f"criterion.{name}", value) for name, value in criterion.named_parameters()),
    ]
    assert len({id(value) for _, value in names}) == len(by_id)
    return {name: by_id[id(value)] for name, value in names}


def test_rates_fall_from_the_head_to_the_stem(student: Student) -> None:
    criterion = torch.nn.Linear(16, 4)
    found = factors(student, criterion, 0.5)
    for name, factor in found.items():
        block = name.removeprefix("vit.transformer.layers.").partition(".")[0]
        layer = int(block) + 1 if block.isdigit() else 0
        if name.startswith(("vit.mlp_head", "vit.transformer.norm", "criterion")):
            layer = 4
        assert factor == 0.5 ** (4 - layer), name
    assert found["vit.mlp_head.weight"] == found["criterion.weight"] == 1
    assert found["vit.transformer.layers.2.0.to_qkv.weight"] == 0.5
    assert found["vit.pos_embedding"] == found["vit.to_patch_embedding.2.weight"] == 0.5**4


def test_without_decay_all_have_one_rate(student: Student) -> None:
    groups = group_by_rate(student, torch.nn.Linear(16, 4), 1.0)
    assert list(groups) == [1.0]
    assert len(groups[1.0]) == len(list(student.parameters())) + 2


def test_head_of_a_pooled_norm_has_the_full_rate() -> None:
    shape = {"image_size": 32, "patch_size": 16, "dim": 64, "depth": 1, "heads": 2, "mlp_dim": 64, "embedding_dim": 16}
    student = Student(StudentConfig(**shape, pool="map", pooled_norm=False))  # type: ignore[arg-type]
    found = factors(student, torch.nn.Module(), 0.1)
    assert {factor for name, factor in found.items() if ".pool." in name} == {1.0}


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_wrong_decay_is_one_line(decay: float) -> None:
    with pytest.raises(UserError, match=r"layer_decay: expected 0 to 1, got"):
        DistillConfig(("teacher",), "catalog", "output", layer_decay=decay)
