from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from experiments.random_student import write_random_student
from student.config import StudentConfig
from student.model import Student
from student.weight_selection import init_from_larger, select_weights
from vpr.artifacts.card import Embedding
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess

LARGE = StudentConfig(image_size=32, dim=96, depth=3, heads=4, dim_head=24, mlp_dim=128, embedding_dim=32)
SMALL = replace(LARGE, dim=48, depth=2, heads=2, mlp_dim=64)
TOWER = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 96, "head_width": 24, "patch_size": 8, "mlp_ratio": 1.5},
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1},
}


def test_student_of_the_same_shape_is_copied(tmp_path: Path) -> None:
    path = write_random_student(tmp_path / "large", replace(LARGE, stem="conv"))
    torch.manual_seed(1)
    student = Student(replace(LARGE, stem="conv"))
    count = init_from_larger(student, load_artifact(path))
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


def test_open_clip_tower_gives_equal_features(tmp_path: Path) -> None:
    """A copied ViT of open_clip without query biases computes the same in vit-pytorch's network."""
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(**TOWER, quick_gelu=False)
    with torch.no_grad():
        for block in clip.visual.transformer.resblocks:
            block.attn.in_proj_bias[:96].zero_()
            block.attn.in_proj_bias[96:].normal_()  # Key biases have no effect, value biases move to the output.
            block.attn.out_proj.bias.normal_()
    path = tmp_path / "teacher"
    weights = {name: value.contiguous() for name, value in clip.state_dict().items() if name.startswith("visual.")}
    with write_artifact(path, "teacher", {"tower_config": TOWER}) as draft:
        save_file(weights, draft.path / "model.safetensors")
        draft.preprocess = Preprocess(size=32)
        draft.embedding = Embedding(dim=32, normalised=True, dtype="float32")
    student = Student(replace(LARGE, mlp_dim=144, pool="cls"))
    count = init_from_larger(student, load_artifact(path))
    # open_clip has no counterpart of the norm before vit-pytorch's patch projection.
    unselected = {"vit.to_patch_embedding.1.weight", "vit.to_patch_embedding.1.bias", "vit.to_patch_embedding.2.bias"}
    unselected |= {"vit.mlp_head.bias"}
    assert count == sum(v.numel() for n, v in student.state_dict().items() if n not in unselected)
    tokens = torch.randn(2, 17, 96)
    clip.eval()
    student.eval()
    with torch.inference_mode():
        expected = clip.visual.ln_post(clip.visual.transformer(tokens))
        torch.testing.assert_close(student.vit.transformer(tokens), expected, atol=1e-4, rtol=1e-4)


def test_empty_tower_config_has_default_heads(tmp_path: Path) -> None:
    width = {**TOWER["vision_cfg"], "head_width": 64, "width": 128}
    clip = open_clip.model.CLIP(**{**TOWER, "vision_cfg": width}, quick_gelu=False)
    weights = {name: value.contiguous() for name, value in clip.state_dict().items() if name.startswith("visual.")}
    with write_artifact(tmp_path / "teacher", "teacher", {"tower_config": {**TOWER, "vision_cfg": {}}}) as draft:
        save_file(weights, draft.path / "model.safetensors")
    student = Student(replace(LARGE, dim=128, heads=2, dim_head=64, pool="cls"))
    init_from_larger(student, load_artifact(tmp_path / "teacher"))
    assert torch.equal(
        student.state_dict()["vit.transformer.layers.0.0.to_qkv.weight"],
        weights["visual.transformer.resblocks.0.attn.in_proj_weight"],
    )


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
    with pytest.raises(UserError, match="tokens of width 24, the student of 48"):
        init_from_larger(Student(SMALL), load_artifact(narrow))
    with pytest.raises(UserError, match=r"Set model\.family to it"):
        init_from_larger(Student(replace(SMALL, family="small-data")), load_artifact(narrow))
    with write_artifact(tmp_path / "other", "ranges", {}) as draft:
        (draft.path / "ranges.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="is a ranges artifact. Use a student or a teacher"):
        init_from_larger(Student(SMALL), load_artifact(tmp_path / "other"))
