from __future__ import annotations

import pytest
import torch
from torch import nn

from teacher.config import TowerConfig
from teacher.layers import decay_factor, freeze_except, group_by_depth
from teacher.model import Teacher, build_teacher, read_tower
from vpr.common.errors import UserError


def make_teacher(name: str, **changes: object) -> Teacher:
    config = TowerConfig(name, "", embedding_dim=16, batch_norm=True, **changes)  # type: ignore[arg-type]
    return build_teacher(config, read_tower(name), False, device="meta")[0]


@pytest.mark.parametrize(
    ("name", "depth", "first", "last"),
    [
        ("sample-vit", 1 + 4 + 1, "visual.conv1.weight", "visual.ln_post.weight"),
        ("sample", 1 + 4 + 1, "visual.trunk.conv1.0.weight", "visual.head.proj.weight"),
        ("RN50", 1 + 16 + 1, "visual.conv1.weight", "visual.attnpool.positional_embedding"),
        ("convnext_base", 1 + 36 + 1, "visual.trunk.stem.0.weight", "visual.head.proj.weight"),
        ("ViT-B-16-SigLIP", 1 + 12 + 1, "visual.trunk.pos_embed", "visual.trunk.attn_pool.latent"),
    ],
)
def test_layers_are_ordered_from_stem_to_output(name: str, depth: int, first: str, last: str) -> None:
    teacher = make_teacher(name)
    layers = group_by_depth(teacher)
    names = [[key for key, _ in layer] for layer in layers]
    assert len(layers) == depth
    assert first in names[0]
    assert last in names[-1]
    assert "project.linear.weight" in names[-1]
    assert sorted(sum(names, [])) == sorted(key for key, _ in teacher.named_parameters())


def test_decay_factor_falls_towards_the_stem() -> None:
    assert [decay_factor(index, 4, 0.5) for index in range(4)] == [0.125, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("name", ["sample-vit", "sample", "RN50"])
def test_last_blocks_and_output_layers_are_trainable(name: str) -> None:
    teacher = make_teacher(name)
    trainable = freeze_except(teacher, "last", 2)
    layers = group_by_depth(teacher)
    assert [all(p.requires_grad for _, p in layer) for layer in layers] == [False] * (len(layers) - 3) + [True] * 3
    assert not any(p.requires_grad for layer in layers[:-3] for _, p in layer)
    teacher.eval()
    for part in trainable:
        part.train()
    for module in teacher.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.training == module.weight.requires_grad


def test_freezing_of_head_and_tower() -> None:
    teacher = make_teacher("sample-vit", dropout=0.1)
    parts = {"head": (False, True), "classes": (False, False), "projection": (False, True), "tower": (True, False)}
    for part, (tower, added) in {**parts, "all": (True, True)}.items():
        trainable = freeze_except(teacher, part)  # type: ignore[arg-type]
        assert {p.requires_grad for p in teacher.visual.parameters()} == {tower}
        assert {p.requires_grad for p in teacher.project.parameters()} == {added}
        teacher.eval()
        for module in trainable:
            module.train()
        assert teacher.project.get_submodule("dropout").training  # in every stage
        assert teacher.project.get_submodule("norm").training == added
        assert teacher.visual.training == tower


def test_too_many_blocks_are_rejected() -> None:
    with pytest.raises(UserError, match=r"stages\.last_blocks: expected at most 4.*, got 5"):
        freeze_except(make_teacher("sample-vit"), "last", 5)


def test_frozen_blocks_get_no_gradient() -> None:
    teacher, _ = build_teacher(TowerConfig("sample-vit", ""), read_tower("sample-vit"), False)
    freeze_except(teacher, "last", 1)
    teacher(torch.randn(2, 3, 64, 64)).sum().backward()
    assert teacher.visual.transformer.resblocks[2].mlp.c_fc.weight.grad is None
    assert teacher.visual.transformer.resblocks[3].mlp.c_fc.weight.grad is not None
