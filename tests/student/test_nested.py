"""Distillations with nested prefixes: the card, the rotated targets, and what the prefixes are worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from student.config import DimensionConfig, DistillConfig, LossConfig, QuantiseConfig, TargetsConfig
from student.distill import distill
from student.model import load_student
from student.projection import find_projection
from student.qat import check_same_prefixes
from student.teacher_model import load_teacher_model
from tests.student.conftest import STUDENT
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog, load_catalog
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.cut import cut_vectors
from vpr.retrieval.embeddings import embed, score_split, torch_forward

NESTED = LossConfig(nested=(4, 16))
ONE_EPOCH: dict[str, Any] = {"epochs": 1, "targets": TargetsConfig(views=1, bank=32)}
Capture = pytest.CaptureFixture[str]
Train = Callable[..., Artifact]


@pytest.fixture(scope="module")
def train(config: DistillConfig, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that distils with changes of the configuration."""

    def run(**changes: Any) -> Artifact:
        output = tmp_path_factory.mktemp("nested") / "student"
        path = distill(replace(config, **{**ONE_EPOCH, **changes, "output": str(output)}))
        assert path is not None
        return load_artifact(path, "student")

    return run


@pytest.fixture(scope="module")
def nested(train: Train) -> Artifact:
    """Return a student with two prefixes, trained for one epoch."""
    return train(losses=NESTED)


def projection_of(artifact: Artifact) -> torch.Tensor:
    return load_file(artifact.file("projection.safetensors"))["projection"]


def test_targets_are_rotated_to_principal_directions(nested: Artifact, config: DistillConfig) -> None:
    """A prefix of the targets has the recall of the teacher's PCA, computed by SVD."""
    artifact = nested
    assert artifact.card.embedding is not None
    assert artifact.card.embedding.nested == [4, 16]
    rotation = projection_of(artifact)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(256), atol=1e-4)
    cache = load_artifact(f"{artifact.path}-views")
    vectors = np.concatenate([np.load(cache.file(name)) for name in sorted(cache.card.files)]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = np.linalg.svd(vectors)[2][:4].T
    np.testing.assert_allclose(np.abs((directions * rotation[:, :4].numpy()).sum(axis=0)), 1, atol=1e-3)
    teacher = load_teacher_model(load_artifact(config.teacher[0]))
    validation = load_catalog(config.catalog).select(split="validation")
    full = embed(validation, teacher.preprocess, torch_forward(teacher.network))
    prefix = cut_vectors((full @ directions).astype(np.float32), 4)
    recall = artifact.card.metrics["teacher_val_recall_at_1_of_4"]
    assert recall == pytest.approx(score_split(validation, prefix).recall_at_1, abs=0.05)


@pytest.mark.parametrize("method", ["pca", pytest.param("cosine", marks=pytest.mark.slow)])
def test_projection_to_fewer_dimensions_is_rotated(method: Any, train: Train) -> None:
    artifact = train(
        losses=NESTED, model=replace(STUDENT, embedding_dim=24), dimension=DimensionConfig(method, steps=20)
    )
    projection = projection_of(artifact)
    assert projection.shape == (256, 24)
    cache = load_artifact(f"{artifact.path}-views")
    vectors = np.concatenate([np.load(cache.file(name)) for name in sorted(cache.card.files)]).astype(np.float64)
    projected = vectors @ projection.double().numpy()
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    moment = projected.T @ projected / len(projected)
    # In principal directions the dimensions are uncorrelated, and their energy falls.
    assert np.abs(moment - np.diag(np.diag(moment))).max() < 1e-3
    assert (np.diff(np.diag(moment)) < 1e-3).all()


def test_relations_leave_the_targets_as_they_are(train: Train) -> None:
    relations = LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, affinity=1.0, nested=(4,))
    artifact = train(losses=relations, model=replace(STUDENT, embedding_dim=24))
    assert "projection.safetensors" not in artifact.card.files
    assert artifact.card.embedding is not None
    assert artifact.card.embedding.nested == [4]


def test_prefixes_of_weight_zero_are_no_prefixes(train: Train) -> None:
    plain, off = train(), train(losses=replace(NESTED, nested_weights=(0.0, 0.0)))
    assert off.card.embedding == plain.card.embedding
    assert load_student(off.path)[0].state_dict().keys() == load_student(plain.path)[0].state_dict().keys()
    weights = (load_file(artifact.file("model.safetensors")) for artifact in (plain, off))
    for before, after in zip(*(values.values() for values in weights), strict=True):
        assert torch.equal(before, after)


def test_continued_student_keeps_its_directions(nested: Artifact, train: Train, capsys: Capture) -> None:
    # Other views would give other directions.
    again = train(losses=NESTED, start=str(nested.path), targets=TargetsConfig(views=2, bank=32), seed=3)
    log = capsys.readouterr().err
    assert "nested: 1 x the first 4, 1 x the first 16" in log
    assert "the targets keep the projection of student" in log
    assert torch.equal(projection_of(nested), projection_of(again))


def test_prefix_of_the_full_width_is_rejected_before_training(config: DistillConfig, tmp_path: Path) -> None:
    wrong = replace(config, losses=LossConfig(nested=(64, 256)), output=str(tmp_path / "s"))
    with pytest.raises(UserError, match=r"losses\.nested: expected less than the student's 256 dimensions, got 256"):
        distill(wrong)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_nested_losses_bring_a_prefix_nearer_to_the_teacher(
    train: Train, config: DistillConfig, catalog: Catalog
) -> None:
    """Similarities of the first 4 dimensions correlate more with the teacher's.

    Recall is not compared: 16 queries decide nothing, and of an untrained teacher all dimensions are alike.
    """
    images = catalog.select(split="train")
    teacher = load_teacher_model(load_artifact(config.teacher[0]))
    pairs = np.triu_indices(len(images), 1)

    def similarities(vectors: np.ndarray) -> np.ndarray:
        return (vectors @ vectors.T)[pairs]

    expected = similarities(embed(images, teacher.preprocess, torch_forward(teacher.network)))
    correlations: dict[tuple[str, int], float] = {}
    for name, losses in (("plain", LossConfig()), ("nested", LossConfig(nested=(4, 16)))):
        artifact = train(losses=losses, epochs=24, targets=TargetsConfig(views=3, bank=32))
        assert isinstance(artifact.card.preprocess, Preprocess)
        vectors = embed(images, artifact.card.preprocess, torch_forward(load_student(artifact.path)[0]))
        for dim in (4, 256):
            prefix = similarities(cut_vectors(vectors, dim))
            correlations[name, dim] = float(np.corrcoef(prefix, expected)[0, 1])
    assert correlations["nested", 4] > correlations["plain", 4], correlations


def test_qat_keeps_the_projection_of_its_student(train: Train, config: DistillConfig) -> None:
    reduction = {"model": replace(STUDENT, embedding_dim=24), "dimension": DimensionConfig("pca")}
    first = train(**reduction)
    teacher = load_teacher_model(load_artifact(config.teacher[0]))
    data = load_catalog(config.catalog)
    splits = data.select(split="train").take(np.arange(40)), data.select(split="validation")
    for ranges, is_kept in (("ranges", True), ("", False)):
        changed = replace(config, start=str(first.path), quantise=QuantiseConfig(ranges), **reduction)
        projection, metrics = find_projection(changed, teacher, None, *splits, first)
        assert projection is not None
        assert torch.equal(projection, projection_of(first)) == is_kept
        assert 0 < metrics["projected_teacher_val_recall_at_1"] <= 1


def test_qat_needs_the_same_prefixes(nested: Artifact) -> None:
    check_same_prefixes(NESTED, nested)
    with pytest.raises(
        UserError, match=r"losses\.nested: .*student has the nested dimensions 4 16\. Set the same ones"
    ):
        check_same_prefixes(LossConfig(), nested)
