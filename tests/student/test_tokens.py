"""Tokens of students, their standardised targets, and distillations with losses of tokens."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import student.tokens as tokens_module
from student.config import DistillConfig, LossConfig, StudentConfig, TargetsConfig
from student.criterion import DistillationLoss, Labels
from student.distill import distill
from student.losses import align_tokens, token_feature, token_similarity
from student.model import Student, load_student
from student.teacher_model import TeacherModel, load_teacher_model
from student.tokens import Standardisation, TokenMaps, find_teacher_tokens, tap_student, watch_tokens
from teacher.config import TowerConfig
from teacher.fused import FusedTeacher, WhitenedPart
from teacher.tokens import TokenGrid, TokenTap
from tests.student.conftest import STUDENT
from tests.student.test_criterion import catalog as products
from tests.student.test_model import published
from tests.student.towers import randomise
from tests.teacher.test_fuse import write_teacher
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.imaging.preprocess import Preprocess
from vpr.training.config import RunConfig

SHAPE = StudentConfig(image_size=32, dim=48, depth=1, heads=2, dim_head=24, mlp_dim=64, embedding_dim=16)
TOKENS = LossConfig(similarity_kl=0.0, contrastive=0.0, token_similarity=2.0, token_feature=0.5)
ONLINE = TargetsConfig(mode="online", bank=32)


@pytest.fixture(scope="module")
def random_teacher(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a ViT with random weights, of 4 x 4 tokens of 128 channels."""
    tower = TowerConfig("sample-vit", "", 32, embedding_dim=16)
    return write_teacher(tmp_path_factory.mktemp("random") / "teacher", tower, catalog, 0)


@pytest.fixture(scope="module")
def settings(random_teacher: str, catalog: Catalog) -> DistillConfig:
    """Return a distillation of the random teacher with losses of tokens."""
    assert catalog.artifact is not None
    return DistillConfig(
        teacher=(random_teacher,),
        catalog=str(catalog.artifact.path),
        output="student",
        model=replace(STUDENT, embedding_dim=0),
        targets=ONLINE,
        losses=TOKENS,
        epochs=1,
        loader=LoaderConfig(batch_size=16, keep_in_memory=True),
        run=RunConfig(precision="32-true"),
    )


def record(student: Student, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings of a student and its tokens as (batch, tokens, width)."""
    maps: list[Tensor] = []
    with torch.no_grad(), tap_student(student).watch(maps.append):
        embeddings = student(x)
    (tokens,) = maps
    return embeddings, tokens.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("family", ["vit", "small-data"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_tokens_of_a_student_are_those_of_vit_pytorch(family: Any, pool: Any) -> None:
    torch.manual_seed(0)
    config = replace(SHAPE, family=family, pool=pool, depth=2)
    original, student, outputs = published(config).eval(), Student(config).eval(), []
    student.vit.load_state_dict(original.state_dict())
    original.transformer.register_forward_hook(lambda _module, _input, output: outputs.append(output))
    x = torch.randn(3, 3, 32, 32)
    embeddings, tokens = record(student, x)
    with torch.no_grad():
        expected = F.normalize(original(x), dim=1)
    torch.testing.assert_close(embeddings, expected, atol=2e-6, rtol=1e-5)
    has_class_token = family == "small-data" or pool == "cls"
    torch.testing.assert_close(tokens, outputs[0][:, int(has_class_token) :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"registers": 3}, {"pooled_norm": True}, {"stem": "conv"}], ids=str)
def test_embedding_is_pooled_from_the_tokens(changes: dict[str, Any]) -> None:
    student: Student = randomise(Student(replace(SHAPE, pool="mean", **changes)))
    embeddings, tokens = record(student, torch.randn(3, 3, 32, 32))
    assert tokens.shape == (3, 16, 48)
    with torch.no_grad():
        expected = F.normalize(student.vit.mlp_head(student.vit.to_latent(tokens.mean(1))), dim=1)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)


def test_attention_pooling_has_the_tokens_before_it() -> None:
    student: Student = randomise(Student(replace(SHAPE, pool="map")))
    embeddings, tokens = record(student, torch.randn(3, 3, 32, 32))
    with torch.no_grad():
        expected = F.normalize(student.vit.mlp_head(student.vit.transformer.pool(tokens)[:, 0]), dim=1)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_tokens_are_at_the_place_of_their_patch(pool: Any) -> None:
    torch.manual_seed(1)
    student = Student(replace(SHAPE, pool=pool)).eval()
    x = torch.zeros(1, 3, 32, 32)
    changed = x.clone()
    changed[:, :, 8:16, 24:32] = torch.randn(3, 8, 8)
    maps: list[Tensor] = []
    with torch.no_grad(), tap_student(student).watch(maps.append):
        student(x)
        student(changed)
    difference = (maps[1] - maps[0]).norm(dim=1)[0]
    assert divmod(int(difference.argmax()), 4) == (1, 3)


def test_both_networks_run_once() -> None:
    student, teacher, calls = Student(SHAPE), Student(replace(SHAPE, dim=24, heads=1)), []
    for network in (student, teacher):
        network.vit.transformer.register_forward_hook(lambda layer, *_: calls.append(layer))
    x = torch.randn(2, 3, 32, 32)
    with watch_tokens(student, tap_student(teacher)) as maps:
        with torch.inference_mode():
            teacher(x)
        student(x)
    assert calls == [teacher.vit.transformer, student.vit.transformer]
    ours, theirs = maps.latest()
    assert ours.shape == (2, 48, 4, 4)
    assert theirs.shape == (2, 24, 4, 4)
    assert ours.requires_grad
    assert not theirs.is_inference()


def test_standardised_tokens_equal_float64_statistics_of_all_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    scale, offset = torch.tensor([0.1, 1.0, 30.0]), torch.tensor([0.0, -2.0, 500.0])
    steps = [torch.randn(4, 5, 3, generator=generator) * scale + offset + 0.3 * n for n in range(6)]
    layer = Standardisation(3)
    for n, tokens in enumerate(steps, 1):
        seen = np.concatenate([step.double().numpy().reshape(-1, 3) for step in steps[:n]])
        expected = (tokens.double().numpy() - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-5)
        np.testing.assert_allclose(layer(tokens).numpy(), expected, atol=2e-4)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.eval()(steps[0])
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_standardisation_of_two_processes_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two halves of the batch are in two processes, which gather each other's moments."""
    halves = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    one, two = Standardisation(3), Standardisation(3)
    expected = one(halves.flatten(0, 1))

    def gather(local: Tensor) -> Tensor:
        moments = [torch.stack([half.mean((0, 1)), half.var((0, 1), correction=0)]) for half in halves]
        assert torch.allclose(local[0], moments[0], atol=1e-6)
        return torch.stack(moments)

    monkeypatch.setattr(tokens_module, "all_gather_cat", gather)
    torch.testing.assert_close(two(halves[0]), expected[:4])


def test_criterion_compares_projected_and_standardised_tokens() -> None:
    torch.manual_seed(0)
    config = replace(TOKENS, cosine=1e-9, nested=(4,))
    criterion = DistillationLoss(config, Student(SHAPE), Labels(products(["a", "b"])), 16, 24)
    maps = TokenMaps([torch.randn(2, 48, 4, 4)], [torch.randn(2, 24, 3, 3)])
    embeddings = F.normalize(torch.randn(2, 16), dim=1)
    named = criterion(embeddings, embeddings, None, torch.arange(2), 0.0, 0, maps)
    assert set(named) == {"cosine", "cosine_4", "token_similarity", "token_feature"}  # once, not for each prefix
    ours, theirs = align_tokens(maps.student[0], maps.teacher[0])
    assert ours.shape[1] == 9
    torch.testing.assert_close(named["token_similarity"], token_similarity(ours, theirs, 0.07))
    layer = criterion.tokens
    assert layer is not None
    standardised = (theirs - theirs.mean((0, 1))) / (theirs.var((0, 1), correction=0) + 1e-5).sqrt()
    projected = ours @ layer.project.weight.T + layer.project.bias
    torch.testing.assert_close(named["token_feature"], token_feature(projected, standardised))
    total = 2 * named["token_similarity"] + 0.5 * named["token_feature"]
    torch.testing.assert_close(criterion.total(named), total)


def test_other_layers_of_the_criterion_begin_as_without_tokens() -> None:
    initial = []
    for losses in (LossConfig(margin=1.0), LossConfig(margin=1.0, token_feature=1.0)):
        torch.manual_seed(0)
        initial.append(DistillationLoss(losses, Student(SHAPE), Labels(products(["a", "b"])), 24, 8).state_dict())
    assert set(initial[1]) - set(initial[0]) == {
        f"tokens.{name}"
        for name in ("project.weight", "project.bias", "standardise.mean", "standardise.variance", "standardise.steps")
    }
    assert all(torch.equal(value, initial[1][name]) for name, value in initial[0].items())


def read_epochs(artifact: Artifact, name: str) -> list[float]:
    with artifact.file("metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]


def test_steps_lower_the_losses_of_tokens() -> None:
    """The teacher is a larger ViT with random weights and a finer grid."""
    torch.manual_seed(0)
    teacher: Student = randomise(Student(replace(SHAPE, image_size=48, dim=96, depth=2)))
    student, labels = Student(SHAPE), Labels(products(["a", "b"]))
    criterion = DistillationLoss(replace(TOKENS, cosine=1e-9), student, labels, 16, 96)
    optimiser = torch.optim.AdamW([*student.parameters(), *criterion.parameters()], lr=3e-3)
    large = F.interpolate(torch.randn(8, 3, 6, 6), (48, 48), mode="bilinear")
    small, losses = F.interpolate(large, (32, 32), mode="bilinear"), []
    for _ in range(30):
        with watch_tokens(student, tap_student(teacher)) as maps:
            with torch.inference_mode():
                targets = teacher(large)
            named = criterion(student(small), targets.clone(), None, torch.arange(8), 0.0, 0, maps)
        optimiser.zero_grad()
        criterion.total(named).backward()
        optimiser.step()
        losses.append({name: value.item() for name, value in named.items()})
    for name in ("token_similarity", "token_feature"):
        assert losses[-1][name] < 0.7 * losses[0][name], (name, losses[0], losses[-1])


def test_distillation_lowers_the_losses_of_tokens(settings: DistillConfig, tmp_path: Path) -> None:
    run = RunConfig(precision="32-true", ema=0.8, validate_every=2)
    targets = replace(ONLINE, mixup=0.5)
    path = distill(replace(settings, output=str(tmp_path / "s"), epochs=2, run=run, targets=targets, lr=3e-3))
    assert path is not None
    artifact = load_artifact(path, "student")
    for name in ("token_similarity", "token_feature"):
        first, last = read_epochs(artifact, f"{name}_epoch")
        assert last < first, name
    model, _ = load_student(path)  # projection and statistics are dropped
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 16)


def test_without_a_weight_nothing_changes(
    settings: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network is watched, the card has none of the keys, and other losses of tokens do not touch its weights."""

    def fail(*_: object) -> Any:
        raise AssertionError("a network is watched")

    monkeypatch.setattr(TokenTap, "watch", fail)
    paths = [
        distill(replace(settings, output=str(tmp_path / name), losses=losses))
        for name, losses in (("plain", LossConfig()), ("other", LossConfig(token_temperature=0.5)))
    ]
    plain, other = (load_artifact(str(path), "student") for path in paths)
    assert not any(name.startswith("token") for name in plain.card.config["losses"])
    assert other.card.config["losses"]["token_temperature"] == 0.5
    weights = [load_file(artifact.file("model.safetensors")) for artifact in (plain, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_dry_run_shows_the_grids(settings: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = replace(settings.model, image_size=48)
    assert distill(replace(settings, output=str(tmp_path / "s"), dry_run=True, model=model)) is None
    assert list(tmp_path.iterdir()) == []
    err = capsys.readouterr().err
    assert "1 x cosine, 2 x token_similarity, 0.5 x token_feature" in err
    grids = "the teacher's 4 x 4 of 128 channels, the student's 6 x 6 of 64 channels, compared as 4 x 4"
    assert f"tokens: {grids}" in err
    assert "dry run: one step taken, nothing written" in err


def test_assistant_gives_its_tokens(settings: DistillConfig, random_teacher: str) -> None:
    assistant = Student(replace(SHAPE, dim=24, heads=1, pool="cls")).eval()
    model = TeacherModel(assistant, load_artifact(random_teacher), Preprocess(size=32), 16)
    found = find_teacher_tokens(settings, STUDENT, model)
    assert found is not None
    assert found.grid == TokenGrid(4, 4, 24)
    assert find_teacher_tokens(replace(settings, losses=LossConfig()), STUDENT, model) is None


@pytest.mark.parametrize("name", ["token_similarity", "token_feature"])
def test_wrong_settings_are_rejected_by_key(name: str, settings: DistillConfig) -> None:
    losses = LossConfig(**{name: 1.0})
    cases: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: replace(settings, losses=losses, targets=TargetsConfig()),
            rf"^losses\.{name}: needs the teacher's tokens\. Set targets\.mode to online\.$",
        ),
        (lambda: replace(settings, losses=losses, teacher=("a", "b")), rf"^losses\.{name}: several teachers .* set it"),
        (lambda: replace(settings, losses=losses, run=RunConfig(compile=True)), rf"^losses\.{name}: .*run\.compile"),
        (
            lambda: LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, **{name: 1.0}),
            rf"^losses\.{name}: it trains the tokens, .* losses\.cosine to 1",
        ),
        (
            lambda: LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, logits=1.0, **{name: 1.0}),
            r"^losses\.logits: this baseline excludes other losses",
        ),
        (lambda: LossConfig(**{name: -1.0}), rf"^losses\.{name}: expected 0 or more, got -1\.0"),
        (lambda: LossConfig(token_temperature=0.0), r"^losses\.token_temperature: expected 0\.001 to 100, got 0\.0"),
    ]
    for make, message in cases:
        with pytest.raises(UserError, match=message):
            make()


def test_networks_without_several_tokens_are_rejected(
    settings: DistillConfig, catalog: Catalog, tmp_path: Path
) -> None:
    """A ResNet has one token at 32 pixels. No student is written."""
    resnet = write_teacher(tmp_path / "resnet", TowerConfig("sample", "", 32, embedding_dim=16), catalog, 0)
    patch = replace(settings.model, patch_size=32, stem="patch")
    cases = [
        ({"teacher": (resnet,)}, r"^losses\.token_similarity: .*resnet has one token for an image of 32 pixels"),
        ({"model": patch}, r"^losses\.token_similarity: a student of 32 pixels with patches of 32 has one token"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            distill(replace(settings, output=str(tmp_path / "s"), **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["resnet"]


def test_fused_teacher_is_rejected(settings: DistillConfig, random_teacher: str) -> None:
    single = load_teacher_model(load_artifact(random_teacher))
    parts = [WhitenedPart(single.network, 16, single.preprocess, single.preprocess) for _ in range(2)]
    fused = replace(single, network=FusedTeacher(parts, 0))
    with pytest.raises(UserError, match=r"^losses\.token_similarity: .* has no grid of tokens \(it joins several net"):
        find_teacher_tokens(settings, STUDENT, fused)
