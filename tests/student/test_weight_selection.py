from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.random_student import write_random_student
from student.config import StudentConfig
from student.model import Student
from student.start import read_start, resolve_model
from student.weight_selection import init_from_start, select_weights
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError

LARGE = StudentConfig(image_size=32, dim=96, depth=3, heads=4, dim_head=24, mlp_dim=128, embedding_dim=32)
SMALL = replace(LARGE, dim=48, depth=2, heads=2, mlp_dim=64)


def test_student_of_the_same_shape_is_copied(tmp_path: Path) -> None:
    path = write_random_student(tmp_path / "large", replace(LARGE, stem="conv"))
    torch.manual_seed(1)
    student = Student(replace(LARGE, stem="conv"))
    count, difference = init_from_start(student, read_start(load_artifact(path)))
    assert difference is None
    assert count == sum(v.numel() for v in student.state_dict().values())
    from student.model import load_student

    for name, value in load_student(path)[0].state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name


def test_rows_and_columns_are_evenly_spaced() -> None:
    large, small = Student(LARGE), Student(SMALL)
    select_weights(small, large.state_dict(), LARGE.heads)
    selected, weights = small.state_dict(), large.state_dict()
    mlp = "vit.transformer.layers.1.1.net.1.weight"
    assert torch.equal(selected[mlp], weights[mlp][::2, ::2])
    norm = "vit.transformer.norm.weight"
    assert torch.equal(selected[norm], weights[norm][::2])
    assert torch.equal(selected["vit.pos_embedding"], weights["vit.pos_embedding"][..., ::2])


def test_heads_are_selected_separately() -> None:
    """Queries, keys and values of a head come from one head of the larger network."""
    large, small = Student(LARGE), Student(SMALL)
    qkv, out = "vit.transformer.layers.0.0.to_qkv.weight", "vit.transformer.layers.0.0.to_out.0.weight"
    weights = large.state_dict()
    marks = torch.arange(3 * 4 * 24).float()  # Row numbers: part, head, row.
    weights[qkv] = marks[:, None].expand(-1, 96).contiguous()
    weights[out] = marks[: 4 * 24][None].expand(96, -1).contiguous()
    select_weights(small, weights, LARGE.heads)
    rows = small.state_dict()[qkv][:, 0].view(3, 2, 24)
    for part in range(3):
        for head in range(2):
            expected = (part * 4 + 2 * head) * 24 + torch.arange(24)
            assert torch.equal(rows[part, head], expected.float())
    columns = small.state_dict()[out][0].view(2, 24)
    assert torch.equal(columns[1], 2 * 24 + torch.arange(24).float())


def test_positions_of_another_grid_are_resized() -> None:
    large, small = Student(LARGE), Student(replace(LARGE, image_size=48))
    select_weights(small, large.state_dict(), LARGE.heads)
    assert small.state_dict()["vit.pos_embedding"].shape[-2] in (36, 37)
    assert not torch.equal(small.state_dict()["vit.pos_embedding"], Student(small.config).vit.pos_embedding)


def test_class_token_keeps_its_initial_position() -> None:
    torch.manual_seed(0)
    large = Student(replace(LARGE, image_size=48, pool="mean", stem="conv"))
    small = Student(replace(SMALL, pool="cls", stem="patch"))
    before = small.state_dict()["vit.pos_embedding"].clone()
    select_weights(small, large.state_dict(), LARGE.heads)
    positions, grid = small.state_dict()["vit.pos_embedding"], large.state_dict()["vit.pos_embedding"]
    assert torch.equal(positions[..., 0, :], before[..., 0, :])
    expected = torch.nn.functional.interpolate(
        grid.reshape(1, 6, 6, 96).permute(0, 3, 1, 2), (4, 4), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(
        positions[..., 1:, :].reshape(16, 48), expected.permute(0, 2, 3, 1).reshape(16, 96)[:, ::2]
    )


def test_weights_without_counterpart_are_kept() -> None:
    torch.manual_seed(0)
    large, small = Student(replace(LARGE, patch_size=16)), Student(replace(SMALL, patch_size=8))
    before = {name: value.clone() for name, value in small.state_dict().items()}
    select_weights(small, large.state_dict(), LARGE.heads)
    for name in ("1.weight", "2.weight"):
        assert torch.equal(
            small.state_dict()[f"vit.to_patch_embedding.{name}"], before[f"vit.to_patch_embedding.{name}"]
        )
    more_heads = Student(replace(LARGE, heads=8, dim_head=12))
    before = {name: value.clone() for name, value in more_heads.state_dict().items()}
    select_weights(more_heads, Student(LARGE).state_dict(), LARGE.heads)
    for name in ("to_qkv.weight", "to_out.0.weight"):
        key = f"vit.transformer.layers.0.0.{name}"
        assert torch.equal(more_heads.state_dict()[key], before[key])


def test_unsuitable_start_is_rejected(tmp_path: Path) -> None:
    narrow = write_random_student(tmp_path / "narrow", replace(LARGE, dim=24, mlp_dim=32, dim_head=8, embedding_dim=16))
    start = read_start(load_artifact(narrow))
    with pytest.raises(UserError, match=r"smaller than the student, with dim 24 of 48\. Lower model\.dim"):
        resolve_model(SMALL, start)
    with pytest.raises(UserError, match=r"Set model\.family to it"):
        resolve_model(replace(SMALL, family="small-data"), start)
    with write_artifact(tmp_path / "other", "ranges", {}) as draft:
        (draft.path / "ranges.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="is a ranges artifact. Use a student or a teacher"):
        read_start(load_artifact(tmp_path / "other"))
