from __future__ import annotations

from pathlib import Path

import lightning as L
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from teacher.model import TowerConfig, build_teacher, load_teacher, read_tower
from teacher.train import StageConfig, TeacherModule, TrainConfig, train
from vpr.artifact import load_artifact
from vpr.catalog import Catalog
from vpr.errors import UserError
from vpr.loading import LoaderConfig, PictureDataset, training_loader
from vpr.training import warmup_cosine

SMALL = TowerConfig(name="sample", pretrained="", image_size=32)


@pytest.fixture(scope="module")
def trained(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert catalog.artifact is not None
    stages = (StageConfig("head", 1, lr_head=1e-3), StageConfig("all", 2, lr_head=1e-3, lr_tower=1e-3))
    output = str(tmp_path_factory.mktemp("teacher") / "teacher")
    loader = LoaderConfig(batch_size=16)
    return train(TrainConfig(str(catalog.artifact.path), output, SMALL, stages, scale=16.0, loader=loader))


def test_a_trained_teacher_is_loaded_with_its_weights_and_preprocessing(trained: Path) -> None:
    model, artifact = load_teacher(trained)
    assert not model.training
    assert artifact.card.metrics["steps"] == 3 * (64 // 16)
    assert artifact.card.preprocess is not None
    assert artifact.card.preprocess.size == 32
    assert set(load_file(artifact.file("model.safetensors"))) == set(model.state_dict())
    assert artifact.file("metrics.csv").read_text().startswith("arcface")
    with torch.inference_mode():
        out = model(torch.randn(3, 3, 32, 32))
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3))


def test_an_unchanged_training_is_not_repeated(trained: Path, catalog: Catalog) -> None:
    card = load_artifact(trained).card
    before = (trained / "card.json").stat().st_mtime_ns
    stages = tuple(StageConfig(**stage) for stage in card.config["stages"])
    assert catalog.artifact is not None
    loader = LoaderConfig(batch_size=16)
    train(TrainConfig(str(catalog.artifact.path), str(trained), SMALL, stages, scale=16.0, loader=loader))
    assert (trained / "card.json").stat().st_mtime_ns == before


def test_weights_come_from_a_local_safetensors_file(tmp_path: Path) -> None:
    """The path that a downloaded CLIP checkpoint takes, with weights made here."""
    tower = read_tower("sample")
    open_clip.factory._MODEL_CONFIGS["made-here"] = tower
    torch.manual_seed(5)
    clip = open_clip.create_model("made-here", load_weights=False)
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    config = TowerConfig(name="sample", pretrained=str(tmp_path / "clip.safetensors"))
    model, preprocess = build_teacher(config, tower, load_pretrained=True)
    x = torch.randn(2, 3, preprocess.size, preprocess.size)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(clip.visual.eval()(x), dim=1)
        torch.testing.assert_close(model.eval()(x), expected)


def test_preprocessing_is_the_towers_own() -> None:
    _, preprocess = build_teacher(SMALL, read_tower("sample"), load_pretrained=False)
    assert preprocess.mean == open_clip.OPENAI_DATASET_MEAN
    assert (preprocess.size, preprocess.resize, preprocess.crop) == (32, "squash", "none")
    centred = TowerConfig(name="sample", pretrained="", squash=False)
    _, preprocess = build_teacher(centred, read_tower("sample"), load_pretrained=False)
    assert (preprocess.size, preprocess.resize, preprocess.crop) == (96, "shortest", "center")


def test_a_new_projection_sets_the_dimension() -> None:
    model, _ = build_teacher(TowerConfig("sample", "", 32, embedding_dim=24), read_tower("sample"), False)
    assert model.embedding_dim == 24
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 24)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TowerConfig(name="ViT-Q-7"), "'ViT-Q-7' is neither an open_clip model nor a JSON file"),
        (TowerConfig(name="absent.json"), r"absent\.json: cannot be read"),
        (TowerConfig("ViT-B-32", "laion7b"), "ViT-B-32 has no tag 'laion7b': choose from"),
        (TowerConfig("ViT-B-32", "weights.bin"), "pickled weights can run code"),
        (TowerConfig("ViT-B-32", "absent.safetensors"), "no such file"),
        (TowerConfig("sample", "", keep_projection=False), "has no projection to drop"),
    ],
)
def test_wrong_towers_are_named(config: TowerConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_teacher(config, read_tower(config.name), load_pretrained=True)


def test_stages_freeze_the_tower_and_set_the_rates(catalog: Catalog) -> None:
    stages = (StageConfig("head", 2, lr_head=1.0), StageConfig("all", 3, lr_head=0.5, lr_tower=0.1, warmup=0.5))
    config = TrainConfig("c", "o", SMALL, stages)
    teacher, preprocess = build_teacher(SMALL, read_tower("sample"), False)
    training = catalog.select(split="train")
    module = TeacherModule(config, teacher, preprocess, training, catalog.select(split="validation"))
    assert module._rate(5, 10, "tower") == 0
    assert module._rate(5, 10, "head") == pytest.approx(warmup_cosine(5, 20, 2))
    assert module._rate(20 + 14, 10, "tower") == pytest.approx(0.1)
    assert module._rate(20 + 14, 10, "head") == pytest.approx(0.5)
    assert module._rate(50, 10, "head") == 0


@pytest.mark.slow
def test_vit_h_14_takes_a_head_step_and_embeds(catalog: Catalog) -> None:
    """The real tower of 632 M parameters with random weights."""
    tower = TowerConfig(name="ViT-H-14", pretrained="")
    stage = (StageConfig("head", 1, lr_head=1e-2, warmup=0.0),)
    config = TrainConfig("c", "o", tower, stage, loader=LoaderConfig(batch_size=2))
    teacher, preprocess = build_teacher(tower, read_tower(tower.name), load_pretrained=False)
    assert sum(p.numel() for p in teacher.parameters()) == pytest.approx(632e6, rel=0.002)
    assert (teacher.embedding_dim, preprocess.size) == (1024, 224)
    training = catalog.select(split="train")
    module = TeacherModule(config, teacher, preprocess, training, catalog.select(split="validation"))
    before = {name: p.detach().sum().item() for name, p in teacher.named_parameters()}
    head = module.head.weight.detach().clone()
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, training_loader(PictureDataset(training, preprocess), config.loader, 0))
    assert trainer.global_step == 1
    assert not torch.equal(head, module.head.weight)
    assert {name: p.detach().sum().item() for name, p in teacher.named_parameters()} == before
    with torch.inference_mode():
        out = teacher.eval()(torch.randn(1, 3, 224, 224))
    assert out.shape == (1, 1024)
    assert out.norm().item() == pytest.approx(1, abs=1e-4)
