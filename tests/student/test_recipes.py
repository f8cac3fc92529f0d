from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from student.config import DistillConfig
from student.distill import distill
from teacher.config import TowerConfig
from teacher.model import build_teacher, read_tower
from tests.student.test_start import write_teacher
from vpr.artifacts.card import Embedding
from vpr.artifacts.writer import write_artifact
from vpr.cli import read_config
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig

RECIPES = Path(__file__).parents[2] / "student/recipes"


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_recipe_is_read(recipe: str) -> None:
    arguments = ["--recipe", str(RECIPES / recipe), "--teacher", "t", "--catalog", "c", "--output", "o"]
    assert isinstance(read_config(DistillConfig, "student distill", arguments), DistillConfig)


@pytest.fixture(scope="module")
def vit_h_14(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a teacher artifact of the full tower with random weights."""
    config = TowerConfig("ViT-H-14", "")
    tower = read_tower(config.name)
    model, preprocess = build_teacher(config, tower, load_pretrained=False)
    path = tmp_path_factory.mktemp("h14") / "teacher"
    with write_artifact(path, "teacher", {"network": asdict(config), "tower_config": tower}) as draft:
        save_file(model.state_dict(), draft.path / "model.safetensors")
        draft.preprocess = preprocess
        draft.embedding = Embedding(dim=model.embedding_dim, normalised=True, dtype="float32")
    return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a catalogue with more training images than the students have dimensions."""
    return build_catalog(CatalogConfig("sample", str(tmp_path_factory.mktemp("sample") / "catalog")))


@pytest.mark.parametrize(
    ("recipe", "model", "options"),
    [
        ("small-from-h14", "deit_small_patch16_224", []),
        ("tiny-from-h14", "deit_tiny_patch16_224", ["--model.stem", "patch"]),
        ("pretrained", "test_resnet", ["--model.embedding-dim", "64"]),
    ],
)
def test_recipe_starts_from_pretrained_weights(
    recipe: str,
    model: str,
    options: list[str],
    sample: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_teacher(tmp_path / "teacher", embedding_dim=300)
    weights = tmp_path / "start.safetensors"
    save_file(timm.create_model(model, num_classes=0).state_dict(), weights)
    arguments = ["--recipe", recipe, "--teacher", str(tmp_path / "teacher"), "--catalog", str(sample), "--dry-run"]
    arguments += ["--output", str(tmp_path / "student"), "--start", f"timm/{model}", "--start-weights", str(weights)]
    assert distill(read_config(DistillConfig, "student distill", [*arguments, *options])) is None
    lines = capsys.readouterr().err
    assert f"of the student's parameters are selected from timm/{model}" in lines
    assert "one step taken, nothing written" in lines


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "dim"), [("small-from-h14", 256), ("tiny-from-h14", 128)])
def test_h14_recipe_takes_a_step(
    recipe: str,
    dim: int,
    vit_h_14: Path,
    sample: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Train for one step in a dry run, with the full teacher and student."""
    arguments = ["--recipe", recipe, "--teacher", str(vit_h_14), "--dry-run"]
    arguments += ["--catalog", str(sample), "--output", str(tmp_path / "student")]
    assert distill(read_config(DistillConfig, "student distill", arguments)) is None
    lines = capsys.readouterr().err
    assert f"{dim} dimensions" in lines
    # Each of 12 views is a file with a header of 128 bytes and 1024 float16 for each image.
    images = len(load_catalog(sample).select(split="train"))
    megabytes = 12 * (128 + images * 1024 * 2) / 1e6
    assert f"teacher cache: {12 * images} forward passes of teacher, {megabytes:.1f} MB" in lines
    assert "one step taken, nothing written" in lines
    assert list(tmp_path.iterdir()) == []
