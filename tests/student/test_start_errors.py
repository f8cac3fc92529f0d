"""Starts that are rejected before any training, each with a one-line message."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.random_student import write_random_student
from student import start as start_module
from student.config import DistillConfig, StudentConfig
from student.distill import distill
from student.inputs import load_inputs
from student.start import load_start, read_start
from student.weight_selection import init_from_start
from tests.student.test_start import AUTO, build, configure, start_of, test_vit, write_teacher
from tests.student.towers import open_clip_tower, timm_tower
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.training.config import RunConfig

__all__ = ["test_vit"]  # a fixture


def forbid(*_args: Any, **_values: Any) -> None:
    raise AssertionError("must not be called")


def test_start_without_a_licence_is_rejected_before_its_weights_are_loaded(
    catalog: Catalog, test_vit: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_teacher(tmp_path / "teacher", embedding_dim=16)
    assert catalog.artifact is not None
    config = DistillConfig(
        (str(tmp_path / "teacher"),),
        str(catalog.artifact.path),
        str(tmp_path / "student"),
        start="timm/test_vit",
        start_weights=str(test_vit[1]),
        require_licence=True,
    )
    monkeypatch.setattr(start_module, "_load_visual", forbid)
    for checked in (config, replace(config, dry_run=True)):
        with pytest.raises(UserError, match=r"^start_weights: '.*test_vit\.safetensors' records no licence\. Use"):
            distill(checked)
    # open_clip's tags record none either.
    with pytest.raises(UserError, match=r"^start_weights: 'openai' records no licence"):
        load_start(replace(config, start="open_clip/ViT-B-32-quickgelu", start_weights="openai"))
    assert not (tmp_path / "student").exists()


def test_tag_with_a_licence_is_accepted(test_vit: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher.model.download_timm", lambda _model, _tag: load_file(test_vit[1]))
    start = load_start(configure("timm/test_vit", "r160_in1k", require_licence=True))
    assert start is not None
    assert start.licences == ("apache-2.0",)


@pytest.mark.parametrize("name", ["hf-hub:owner/model", "open_clip/hf-hub:owner/model", "open_clip/local-dir:folder"])
def test_names_of_a_hub_are_rejected_without_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.factory._get_hf_config", forbid)
    with pytest.raises(UserError, match=rf"^start: '{name}' is no open_clip model, timm model or JSON file\."):
        load_start(configure(name, "weights.safetensors"))


def test_failed_download_of_open_clip_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_values: Any) -> str:
        raise FileNotFoundError("Failed to download file\nno route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    message = r"^start_weights: cannot load open_clip/ViT-B-32 \(FileNotFoundError: Failed to download file no route to"
    with pytest.raises(UserError, match=message) as error:
        load_start(configure("open_clip/ViT-B-32", "laion2b_s34b_b79k"))
    assert str(error.value).endswith("Check the network, or set start_weights to a .safetensors file.")


def test_statistics_of_a_file_that_differ_between_tags(test_vit: tuple[Any, Path]) -> None:
    with pytest.raises(UserError, match=r"^start_weights: .* Set it to a tag, or to a teacher trained from the file"):
        load_start(configure("open_clip/ViT-L-14", str(test_vit[1])))


def test_weights_without_the_projection_start_a_new_head(tmp_path: Path) -> None:
    visual = open_clip_tower("ViT-B-32")
    tower = {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 96, "layers": 2, "width": 192, "patch_size": 32},
    }
    (tmp_path / "tower.json").write_text(json.dumps(tower))
    state = {name: value.contiguous() for name, value in visual.state_dict().items() if name != "proj"}
    save_file(state, tmp_path / "weights.safetensors")
    start = load_start(configure(str(tmp_path / "tower.json"), str(tmp_path / "weights.safetensors")))
    assert start is not None
    assert not any(name.startswith("vit.mlp_head") for name in start.weights)
    _, difference = init_from_start(build(start), start)
    assert difference is not None
    assert difference <= 1e-5


def test_file_of_a_teacher_is_that_teacher(tmp_path: Path) -> None:
    """The card of the teacher records mean and std, which a file does not."""
    write_teacher(tmp_path / "teacher", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    for path in (tmp_path / "teacher", tmp_path / "teacher" / "model.safetensors"):
        start = load_start(configure("timm/test_vit", str(path)))
        assert start is not None
        assert start.artifact is not None
        assert start.statistics == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_smaller_student_of_weights_that_are_not_finite(value: float) -> None:
    visual = timm_tower("deit_tiny_patch16_224")
    with torch.no_grad():
        visual.trunk.blocks[0].mlp.fc1.bias.fill_(value)
    start = start_of(visual)
    message = r"^start: a tower has weights that are not finite, in 'vit\.transformer\.layers\.0\.1\.net\.1\.bias'"
    with pytest.raises(UserError, match=message):
        init_from_start(build(start, dim=128, heads=2, dim_head=64), start)


def test_one_head_as_wide_as_the_tokens_is_rejected() -> None:
    """vit-pytorch gives it no projection of the output, so that of the start would be lost."""
    start = start_of(timm_tower("deit_tiny_patch16_224"))
    with pytest.raises(UserError, match=r"^model\.heads: one head of the tokens' width 64 has no output projection"):
        build(start, dim=64, heads=1)
    assert build(start, dim=128, heads=1).config.heads == 1


def test_student_artifact_of_other_weights_is_no_start(tmp_path: Path) -> None:
    """Weights that no longer fit their card would otherwise be skipped, which leaves a random student."""
    shape = StudentConfig(image_size=32, patch_size=8, dim=64, depth=2, heads=2, dim_head=32, mlp_dim=96)
    narrow = write_random_student(tmp_path / "narrow", replace(shape, dim=32, embedding_dim=16))
    weights = load_file(load_artifact(narrow).file("model.safetensors"))
    with write_artifact(tmp_path / "wrong", "student", {"model": asdict(replace(shape, embedding_dim=16))}) as draft:
        save_file(weights, draft.path / "model.safetensors")
    with pytest.raises(UserError, match=r"not a usable student \(the weights do not fit the network of the card\)"):
        read_start(load_artifact(tmp_path / "wrong"))


def test_more_registers_than_the_start_keep_its_own() -> None:
    start = start_of(timm_tower("vit_small_patch14_reg4_dinov2"))
    student = build(start, registers=6)
    new = student.vit.transformer.registers[4:].clone()
    init_from_start(student, start)
    registers = student.vit.transformer.registers
    assert torch.equal(registers[:4], start.weights["vit.transformer.registers"])
    assert torch.equal(registers[4:], new)


def test_several_teachers_keep_the_start(catalog: Catalog, test_vit: tuple[Any, Path], tmp_path: Path) -> None:
    """Also in a dry run, which writes no fused teacher. The width of the embedding is that of the fusion."""
    assert catalog.artifact is not None
    teachers = {str(tmp_path / "first"): 16, str(tmp_path / "second"): 12}
    for path, width in teachers.items():
        write_teacher(Path(path), catalog, embedding_dim=width)
    config = DistillConfig(
        tuple(teachers),
        str(catalog.artifact.path),
        str(tmp_path / "student"),
        start="timm/test_vit",
        start_weights=str(test_vit[1]),
        model=replace(AUTO, image_size=32, embedding_dim=8),
        loader=LoaderConfig(batch_size=32),
        run=RunConfig(precision="32-true"),
        dry_run=True,
    )
    inputs = load_inputs(config)
    assert (inputs.model.dim, inputs.model.embedding_dim, inputs.model.qkv_bias) == (64, 8, True)
    assert distill(config) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
