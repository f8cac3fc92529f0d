from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from student.config import DimensionConfig, DistillConfig, LossConfig, StudentConfig, TargetsConfig
from student.distill import distill
from teacher.config import FuseConfig, SoupConfig, TowerConfig
from teacher.fuse import fuse
from teacher.fused import fit_whitening
from teacher.model import build_teacher, load_teacher, read_tower
from teacher.soup import soup
from tests.conftest import edit_card
from vpr.artifacts.card import Embedding
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.cli import main
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.pixels import read_pixels
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import embed, l2_normalize, score_split, torch_forward
from vpr.training.config import RunConfig

SHRINKAGE = 0.1
LARGE = TowerConfig("sample", "", 48, embedding_dim=12)
SMALL = TowerConfig("sample-vit", "", 32, embedding_dim=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))


def write_teacher(path: Path, config: TowerConfig, catalog: Catalog, seed: int, **in_catalog: Any) -> str:
    """Write a teacher with random weights."""
    tower = read_tower(config.name)
    torch.manual_seed(seed)
    model, preprocess = build_teacher(config, tower, load_pretrained=False)
    with write_artifact(path, "teacher", {"network": asdict(config), "tower_config": tower}) as writer:
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()}, writer.path / "model.safetensors"
        )
        writer.preprocess = preprocess
        writer.embedding = Embedding(dim=model.embedding_dim, normalised=True, dtype="float32")
        writer.catalog = {**catalog.summary(), **in_catalog}
    return str(path)


@pytest.fixture(scope="module")
def teachers(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    return write_teacher(folder / "large", LARGE, catalog, 0), write_teacher(folder / "small", SMALL, catalog, 1)


@pytest.fixture(scope="module")
def config(catalog: Catalog, teachers: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> FuseConfig:
    assert catalog.artifact is not None
    output = tmp_path_factory.mktemp("fused") / "fused"
    return FuseConfig(teachers, str(catalog.artifact.path), str(output), embedding_dim=6, steps=20)


@pytest.fixture(scope="module")
def fused(config: FuseConfig) -> Path:
    return fuse(config)


def part_inputs(catalog: Catalog, shared: Preprocess, own: Preprocess) -> torch.Tensor:
    """Return the inputs of a teacher from the pixels at the size of the fused teacher."""
    pixels = torch.from_numpy(read_pixels(catalog, shared, range(len(catalog)))).double()
    if own.size != shared.size:
        size = (own.size, own.size)
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None].double() for values in (own.mean, own.std))
    return ((pixels / 255 - mean) / std).float()


def part_embeddings(path: str, catalog: Catalog, shared: Preprocess) -> np.ndarray:
    model, artifact = load_teacher(path)
    assert artifact.card.preprocess is not None
    with torch.inference_mode():
        return model(part_inputs(catalog, shared, artifact.card.preprocess)).double().numpy()


def whiten_by_loop(fitted: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Whiten by Cholesky factor, which equals the inverse square root up to a rotation."""
    covariance = np.cov(fitted.T, bias=True)
    dim = len(covariance)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / dim * np.eye(dim)
    whitened = np.linalg.solve(np.linalg.cholesky(shrunk), (vectors - fitted.mean(axis=0)).T).T
    return whitened / np.linalg.norm(whitened, axis=1, keepdims=True)


def test_concatenation_equals_a_float64_reference(
    config: FuseConfig, catalog: Catalog, teachers: tuple[str, str], tmp_path: Path
) -> None:
    path = fuse(replace(config, output=str(tmp_path / "whole"), embedding_dim=0))
    model, artifact = load_teacher(path)
    shared = artifact.card.preprocess
    assert shared is not None
    assert shared.size == 48
    training, validation = catalog.select(split="train"), catalog.select(split="validation")
    vectors = embed(validation, shared, torch_forward(model))
    assert vectors.shape[1] == model.embedding_dim == 20
    cosines = [
        (part := whiten_by_loop(part_embeddings(path, training, shared), part_embeddings(path, validation, shared)))
        @ part.T
        for path in teachers
    ]
    np.testing.assert_allclose(vectors @ vectors.T, np.mean(cosines, axis=0), atol=2e-4)


def test_reduction_projects_the_concatenation(config: FuseConfig, fused: Path, catalog: Catalog) -> None:
    model, artifact = load_teacher(fused)
    assert artifact.card.preprocess is not None
    images = catalog.select(split="validation")
    joined = embed(
        images, artifact.card.preprocess, lambda batch: model.concatenate(torch.from_numpy(batch)).detach().numpy()
    )
    expected = joined.astype(np.float64) @ model.reduction.double().numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embed(images, artifact.card.preprocess, torch_forward(model)), expected, atol=1e-5)


def test_whitened_embeddings_have_identity_covariance() -> None:
    rng = np.random.default_rng(0)
    vectors = l2_normalize((rng.standard_normal((500, 16)) / np.arange(1, 17) + 0.3).astype(np.float32))
    mean, matrix = fit_whitening(vectors, 1e-6)
    whitened = (vectors - mean.numpy()).astype(np.float64) @ matrix.numpy()
    np.testing.assert_allclose(np.cov(whitened.T, bias=True), np.eye(16), atol=2e-3)
    np.testing.assert_allclose(whitened.mean(axis=0), 0, atol=1e-3)
    full = fit_whitening(vectors, 1.0)[1].numpy()  # only scales
    np.testing.assert_allclose(full, full[0, 0] * np.eye(16), atol=1e-5)


def test_fewer_images_than_dimensions_are_reported(
    config: FuseConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = fuse(replace(config, output=str(tmp_path / "few"), images=10))
    assert "large: 10 images for 12 dimensions" in caplog.text
    assert "small: " not in caplog.text
    model, _ = load_teacher(path)
    matrix = model.parts[0].matrix.double()
    assert torch.linalg.eigvalsh(matrix).min() > 0  # every direction is kept


def test_card_has_recall_of_each_teacher(fused: Path, catalog: Catalog, teachers: tuple[str, str]) -> None:
    card, images = load_artifact(fused, "teacher").card, catalog.select(split="validation")
    for path, row in zip(teachers, card.metrics["teachers"], strict=True):
        model, artifact = load_teacher(path)
        assert artifact.card.preprocess is not None
        scores = score_split(images, embed(images, artifact.card.preprocess, torch_forward(model)))
        assert (row["name"], row["val_recall_at_1"]) == (Path(path).name, pytest.approx(scores.recall_at_1))
    assert card.embedding == Embedding(dim=6, normalised=True, dtype="float32")
    assert [parent.role for parent in card.parents] == ["teacher", "teacher", "catalog"]


def test_unchanged_inputs_are_up_to_date(config: FuseConfig, fused: Path) -> None:
    before = load_artifact(fused).sha256
    assert load_artifact(fuse(config)).sha256 == before
    assert (
        load_artifact(fuse(replace(config, output=f"{config.output}-2"))).card.files == load_artifact(fused).card.files
    )


def test_resize_in_the_network_is_close_to_the_teachers_own(catalog: Catalog, teachers: tuple[str, str]) -> None:
    large, small = (load_artifact(path).card.preprocess for path in teachers)
    assert large is not None
    assert small is not None
    images = catalog.select(split="validation")
    mean, std = (np.array(values)[:, None, None] for values in (small.mean, small.std))
    resized = (part_inputs(images, large, small).numpy() * std + mean) * 255
    own = read_pixels(images, small, range(len(images))).astype(np.float64)
    assert np.abs(resized - own).mean() < 4  # grey levels of 255
    cosine = (part_embeddings(teachers[1], images, large) * part_embeddings(teachers[1], images, small)).sum(axis=1)
    assert cosine.min() > 0.98


def test_fused_teacher_embeds_by_command(fused: Path, config: FuseConfig, tmp_path: Path) -> None:
    flags = ["--model", str(fused), "--catalog", config.catalog, "--output", str(tmp_path / "e")]
    main(["teacher", "embed", *flags])
    assert np.load(tmp_path / "e" / "vectors.npy").shape[1] == 6


def distillation(config: FuseConfig, output: Path) -> DistillConfig:
    shape = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 1, "heads": 1, "dim_head": 32, "mlp_dim": 32}
    return DistillConfig(
        teacher=config.models,
        catalog=config.catalog,
        output=str(output),
        model=StudentConfig(**shape, embedding_dim=6),  # type: ignore[arg-type]
        targets=TargetsConfig(views=1, bank=16),
        losses=LossConfig(),
        epochs=1,
        loader=LoaderConfig(batch_size=16, keep_in_memory=True),
        run=RunConfig(precision="32-true"),
    )


def test_student_of_two_teachers(config: FuseConfig, tmp_path: Path) -> None:
    values = distillation(config, tmp_path / "student")
    assert distill(replace(values, dry_run=True)) is None
    assert not list(tmp_path.iterdir())
    path = distill(values)
    assert path is not None
    teacher = load_artifact(tmp_path / "student-teacher", "teacher")
    student = load_artifact(path, "student")
    assert teacher.as_parent("teacher") in student.card.parents
    assert len(teacher.card.metrics["teachers"]) == 2
    distill(values)
    assert load_artifact(tmp_path / "student-teacher").sha256 == teacher.sha256


def test_dry_run_makes_the_checks_of_the_real_run(config: FuseConfig, tmp_path: Path) -> None:
    good = distillation(config, tmp_path / "student")
    wide, few = replace(good.model, embedding_dim=21), DimensionConfig(images=6)
    for changes, message in (
        ({"model": wide}, r"model\.embedding_dim: the 2 teachers have 20 dimensions together, got 21\."),
        ({"dimension": few}, r"model\.embedding_dim: the embeddings give at most 5 directions, got 6\."),
        ({"dimension": DimensionConfig("pca")}, r"dimension\.method: .*preserves cosines, got pca"),
        ({"assistant": config.models[0]}, r"teacher: the assistant replaces the teachers"),
        ({"teacher": (config.models[0], "nope")}, r"nope: no artifact here"),
        ({"start": "nope"}, r"nope: no artifact here"),
        ({"require_licence": True}, r"large: no licence is recorded"),
    ):
        for is_dry in (True, False):
            with pytest.raises(UserError, match=message):
                distill(replace(good, dry_run=is_dry, **changes))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_fusion_replaces_no_other_teacher(config: FuseConfig, catalog: Catalog, tmp_path: Path) -> None:
    other = write_teacher(tmp_path / "student-teacher", SMALL, catalog, 5)
    before = load_artifact(other).sha256
    for is_dry in (True, False):
        with pytest.raises(UserError, match=r"output: the fusion would replace the teacher .*student-teacher\."):
            distill(replace(distillation(config, tmp_path / "student"), dry_run=is_dry))
    assert load_artifact(other).sha256 == before


def test_default_width_is_that_of_narrow_teachers(config: FuseConfig, tmp_path: Path) -> None:
    values = distillation(config, tmp_path / "student")
    path = distill(replace(values, model=replace(values.model, embedding_dim=0)))
    assert path is not None
    assert load_artifact(path, "student").card.embedding == Embedding(dim=20, normalised=True, dtype="float32")


def test_a_teacher_better_than_the_fusion_is_reported(
    config: FuseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "teacher.fuse.score_split", lambda _, vectors: SimpleNamespace(recall_at_1=1 / vectors.shape[1], map=0)
    )
    fuse(replace(config, output=str(tmp_path / "wide"), embedding_dim=0))
    assert f"{config.models[1]} alone has more recall" in caplog.text


def other_catalog(folder: Path, catalog: Catalog, config: FuseConfig) -> dict[str, Any]:
    return {"models": (config.models[0], write_teacher(folder / "other", SMALL, catalog, 2, sha256="0" * 64))}


def both_other(folder: Path, catalog: Catalog, config: FuseConfig) -> dict[str, Any]:
    names = enumerate(("first", "second"))
    return {"models": tuple(write_teacher(folder / name, SMALL, catalog, n, sha256="0" * 64) for n, name in names)}


def cropped(folder: Path, catalog: Catalog, config: FuseConfig) -> dict[str, Any]:
    return {"models": (config.models[0], write_teacher(folder / "crop", replace(SMALL, squash=False), catalog, 2))}


def nested(folder: Path, catalog: Catalog, config: FuseConfig) -> dict[str, Any]:
    return {"models": (config.models[0], str(fuse(config)))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_catalog, r"other: trained on another catalogue than .*large\. Train both on one"),
        (both_other, r"first: trained on another catalogue than --catalog\."),
        (cropped, r"crop: preprocessing 'resize' is shortest, that of .*large is squash\."),
        (nested, r"fused: holds several teachers already\. Name its teachers"),
        (lambda *_: {"embedding_dim": 21}, r"embedding_dim: the 2 teachers have 20 dimensions together, got 21\."),
        (lambda *_: {"images": 6}, r"catalog: 7 training images are needed to fit 6 dimensions, got 6\."),
        (
            lambda _, __, config: {"models": config.models[:1] * 2},
            r"large: the same teacher as .*large\. Name each once",
        ),
        (lambda _, __, config: {"models": config.models[:1]}, r"models: expected two to eight teachers, got 1\."),
        (lambda _, __, config: {"output": config.models[0]}, r"output: .*large is one of the models"),
        (lambda *_: {"shrinkage": 0.0}, r"shrinkage: expected 1e-06 to 1, got 0\.0\."),
    ],
)
def test_bad_input_is_one_line(
    config: FuseConfig, catalog: Catalog, tmp_path: Path, change: Callable[..., dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        fuse(replace(config, **{"output": str(tmp_path / "new"), **change(tmp_path, catalog, config)}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_broken_card_is_one_line(config: FuseConfig, tmp_path: Path) -> None:
    path = fuse(replace(config, output=str(tmp_path / "broken")))
    values = load_artifact(path).card.config
    edit_card(path, config={**values, "parts": values["parts"][:1]})
    with pytest.raises(UserError, match=r"broken: expected 2 to 8 teachers in its card, got 1\."):
        load_teacher(path)


def test_embeddings_without_information_are_rejected() -> None:
    with pytest.raises(UserError, match="runs/a: the teacher returns the same embedding for every image"):
        fit_whitening(np.ones((8, 4), np.float32) / 2, SHRINKAGE, "runs/a")
    with pytest.raises(UserError, match="runs/a: the teacher returns embeddings that are not finite"):
        fit_whitening(np.full((8, 4), np.nan, np.float32), SHRINKAGE, "runs/a")


def test_card_cannot_allocate_without_bound(config: FuseConfig, tmp_path: Path) -> None:
    path = fuse(replace(config, output=str(tmp_path / "broken")))
    parts = load_artifact(path).card.config["parts"]
    parts[0]["network"]["embedding_dim"] = 65536
    edit_card(path, config={**load_artifact(path).card.config, "parts": parts})
    with pytest.raises(UserError, match="at most 8192 dimensions, got 65536"):
        load_teacher(path)


def test_soup_of_a_fused_teacher_is_rejected(config: FuseConfig, fused: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fused: holds several teachers\. Average its teachers"):
        soup(SoupConfig((str(fused), config.models[0]), config.catalog, str(tmp_path / "soup")))


def test_training_does_not_start_from_a_fused_teacher(fused: Path) -> None:
    config = replace(LARGE, pretrained=str(fused))
    with pytest.raises(UserError, match="tower.pretrained: .* holds several teachers"):
        build_teacher(config, read_tower("sample"), load_pretrained=True)
