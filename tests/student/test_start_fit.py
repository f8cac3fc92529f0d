"""Closed-form fit of the head of a student that starts from a pretrained model."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from student.config import DimensionConfig, DistillConfig, LossConfig, StudentConfig, TargetsConfig
from student.distill import distill
from student.model import Student, load_student
from student.start_fit import _fit_projection, _predict, _predictive, _principal, ridge, rotate
from student.weight_selection import _silence_blocks
from teacher.model import load_teacher
from tests.student.test_start import write_teacher
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.retrieval.embeddings import embed, torch_forward
from vpr.training.config import RunConfig


def sample(n: int = 60, d: int = 7, k: int = 4, noise: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(n, d)) * np.linspace(0.2, 3, d) + 1
    y = x @ generator.normal(size=(d, k)) + noise * generator.normal(size=(n, k)) - 2
    return torch.from_numpy(x), torch.from_numpy(y), torch.arange(n) // 3


def least_squares(x: Tensor, y: Tensor, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Solve ridge regression as least squares of extra rows, with an unpenalised constant."""
    a, b = x.numpy(), y.numpy()
    scale = np.sqrt(penalty * np.square(a - a.mean(0)).sum(0).mean())
    penalised = np.hstack([scale * np.eye(a.shape[1]), np.zeros((a.shape[1], 1))])
    rows = np.vstack([np.hstack([a, np.ones((len(a), 1))]), penalised])
    solution = np.linalg.lstsq(rows, np.vstack([b, np.zeros((a.shape[1], b.shape[1]))]), rcond=None)[0]
    return solution[:-1], solution[-1]


@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_ridge_is_the_best_of_the_penalised_least_squares(noise: float) -> None:
    x, y, groups = sample(noise=noise)
    weight, bias, cosine = ridge(x, y, groups)
    held_out = (groups % 5 == 0).numpy()
    solutions = {}
    for power in range(-4, 3):
        w, b = least_squares(x[~held_out], y[~held_out], 10.0**power)
        p, q = x.numpy()[held_out] @ w + b, y.numpy()[held_out]
        cosines = (p * q).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1)
        solutions[power] = cosines.mean()
    best = max(solutions, key=lambda power: solutions[power])
    assert cosine == pytest.approx(solutions[best], abs=1e-9)
    expected = least_squares(x, y, 10.0**best)
    np.testing.assert_allclose(weight.numpy(), expected[0], atol=1e-9)
    np.testing.assert_allclose(bias.numpy(), expected[1], atol=1e-9)


def test_ridge_of_one_group_and_of_constant_features() -> None:
    x, y, groups = sample()
    assert ridge(x, y, torch.zeros_like(groups))[2] > 0.9
    weight, bias, _ = ridge(torch.ones_like(x), y, groups)
    torch.testing.assert_close(torch.ones_like(x) @ weight + bias, y.mean(0).expand_as(y))


def test_projection_keeps_the_best_prediction_of_its_rank() -> None:
    x, y, groups = sample(d=9, k=6)
    weight, _, _ = ridge(x, y, groups)
    project = nn.Conv2d(9, 3, 1).double()
    _fit_projection(project, _predictive(x, y, groups), x)
    tokens = project(x[:, :, None, None]).flatten(1)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(tokens.detach().std(0).square().mean()) == pytest.approx(1)
    fitted = (x - x.mean(0)) @ weight
    # The best approximation of rank 3, by Eckart and Young.
    u, s, v = np.linalg.svd(fitted.numpy(), full_matrices=False)
    best = np.linalg.norm(fitted.numpy() - (u[:, :3] * s[:3]) @ v[:3])
    predicted = tokens @ torch.linalg.lstsq(tokens, fitted).solution
    assert float(torch.linalg.norm(fitted - predicted).detach()) == pytest.approx(best, rel=1e-9)


def test_channels_beyond_the_targets_keep_their_directions() -> None:
    x, y, groups = sample(d=9, k=2)
    project = nn.Conv2d(9, 4, 1).double()
    initial = project.weight.detach().flatten(1).clone()
    _fit_projection(project, _predictive(x, y, groups), x)
    found = project.weight.detach().flatten(1)
    torch.testing.assert_close(
        torch.cosine_similarity(found[2:], initial[2:]).abs(), torch.ones(2, dtype=torch.float64)
    )


@pytest.mark.parametrize("width", [3, 7, 11])
@pytest.mark.parametrize("has_targets", [True, False])
def test_rotation_keeps_angles_around_the_mean(width: int, has_targets: bool) -> None:
    x = sample()[0]
    y = torch.from_numpy(np.random.default_rng(1).normal(size=(len(x), width if has_targets else 2))) + 3
    weight, bias = rotate(x, y, width)
    mapped = x @ weight + bias
    centred, moved = (x - x.mean(0)).numpy(), (mapped - mapped.mean(0)).numpy()
    rank = min(width, 7)
    u, s, v = np.linalg.svd(centred, full_matrices=False)
    expected = (u[:, :rank] * s[:rank] ** 2) @ u[:, :rank].T  # the best approximation of the products of this rank
    scale = (moved @ moved.T).trace() / expected.trace()
    np.testing.assert_allclose(moved @ moved.T, scale * expected, atol=1e-8)
    offset = y.mean(0) if has_targets else torch.zeros(width, dtype=torch.float64)
    torch.testing.assert_close(mapped.mean(0), offset, atol=1e-9, rtol=0)


def test_rotation_is_that_of_scipy() -> None:
    from scipy.linalg import orthogonal_procrustes

    x, y, _ = sample(d=5, k=5)
    weight, _ = rotate(x, y, 5)
    centred, targets = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    rotation, scale = orthogonal_procrustes(centred, targets)
    np.testing.assert_allclose(weight.numpy(), rotation * scale / np.square(centred).sum(), atol=1e-9)


def test_principal_directions_are_those_of_the_svd() -> None:
    x = sample()[0]
    found = _principal(x).numpy()
    expected = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)[2]
    np.testing.assert_allclose(np.abs((expected * found.T).sum(1)), 1, atol=1e-9)


@pytest.mark.parametrize("width", [2, 6])
def test_prediction_of_another_width_keeps_its_first_directions(width: int) -> None:
    x, y, groups = sample()
    weight, bias = _predict(x, y, groups, width)
    fitted = (x - x.mean(0)) @ ridge(x, y, groups)[0]
    u, s, _ = torch.linalg.svd(fitted, full_matrices=False)
    rank = min(width, 4)
    moved = x @ weight + bias
    torch.testing.assert_close(moved @ moved.T, (u[:, :rank] * s[:rank] ** 2) @ u[:, :rank].T, atol=1e-8, rtol=0)
    same = _predict(x, y, groups, 4)
    torch.testing.assert_close(same[0], ridge(x, y, groups)[0])


def test_silent_blocks_return_their_input() -> None:
    shape: dict[str, Any] = {"image_size": 64, "patch_size": 32, "dim": 64, "depth": 2, "heads": 2, "embedding_dim": 8}
    student = Student(StudentConfig(**shape, stem="timm/test_resnet"))
    _silence_blocks(student)
    tokens = torch.randn(2, 4, 64)
    for attention, mlp in student.vit.transformer.layers:
        assert float(attention(tokens).abs().max()) == 0
        assert float(mlp(tokens).abs().max()) == 0
    student(torch.randn(2, 3, 64, 64)).sum().backward()
    assert student.vit.transformer.layers[0][1].net[4].weight.grad is not None


def _gather_in_training(value: Tensor) -> Tensor:
    """Return the embeddings of this process; fail outside a training step."""
    assert any(frame.function == "training_step" for frame in inspect.stack(0))
    return value


@pytest.mark.parametrize("mode", ["cached", "online"])
@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_training_begins_with_the_fitted_head(
    catalog: Catalog,
    tmp_path: Path,
    model: str,
    mode: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    caplog.set_level("INFO")
    save_file(timm.create_model(model, num_classes=0).state_dict(), tmp_path / "start.safetensors")
    write_teacher(tmp_path / "teacher", embedding_dim=16)
    assert catalog.artifact is not None
    # A learning rate of almost nothing keeps the weights that training begins with.
    config = DistillConfig(
        (str(tmp_path / "teacher"),),
        str(catalog.artifact.path),
        str(tmp_path / "fitted"),
        start=f"timm/{model}",
        start_weights=str(tmp_path / "start.safetensors"),
        model=StudentConfig(preset="auto", pool="auto", image_size=64),
        targets=TargetsConfig(mode=mode, views=2, bank=32),
        epochs=1,
        lr=1e-12,
        loader=LoaderConfig(batch_size=32, keep_in_memory=True),
        run=RunConfig(precision="32-true"),
    )
    # The fit reads no other process: before the training, their group does not exist.
    monkeypatch.setattr("student.targets.all_gather_cat", _gather_in_training)
    kinds: tuple[Any, ...] = ("teacher", "features", "none")
    paths = {fit: distill(replace(config, output=str(tmp_path / f"fit-{fit}"), fit_head=fit)) for fit in kinds}
    assert caplog.text.count("the new head begins with ") == 2
    training = catalog.select(split="train")
    teacher, artifact = load_teacher(tmp_path / "teacher")
    assert artifact.card.preprocess is not None
    targets = embed(training, artifact.card.preprocess, torch_forward(teacher))
    cosines = {}
    for fit, path in paths.items():
        assert path is not None
        student, artifact = load_student(path)
        assert artifact.card.preprocess is not None
        assert ("fit_head" in artifact.card.config) == (fit != "none")
        found = embed(training, artifact.card.preprocess, torch_forward(student))
        cosines[fit] = float((found * targets).sum(1).mean())
    assert cosines["teacher"] > 0.8 > cosines["none"]
    assert cosines["features"] > 0.8


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"fit_head": "none"}, False),
        ({"losses": LossConfig(cosine=0, similarity_kl=0, contrastive=0, margin=1)}, False),
        ({"losses": LossConfig(cosine=0, similarity_kl=0, contrastive=0, logits=1)}, False),
        ({"dimension": DimensionConfig("projector")}, True),
    ],
)
def test_a_head_is_fitted_to_a_teacher(changes: dict[str, Any], fits: bool) -> None:
    assert DistillConfig(("teacher",), "catalog", "output", **changes).fits_head is fits
